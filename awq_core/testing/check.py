"""The conformance kit without a test file: `check(name)` makes the configurations, runs the kit, returns the results.

    claimed model types ──their own default configuration, made small──> cases ──ArchitectureConformance──> results

An author gives nothing. A model type without a default configuration here (its code is elsewhere), or with one that
cannot be made small, is reported with the reason; `configs` gives one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import importlib_metadata
from transformers import AutoConfig

from awq_core.errors import PluginError
from awq_core.hooks.loading import GROUP
from awq_core.hooks.manager import Owner, PluginManager, default_manager
from awq_core.model_folder import import_auto_module, open_config
from awq_core.scaffold import smallest_config

TEST_FILE = """
from awq_core.testing import ArchitectureConformance
from awq_core.testing.check import Cases


class TestPlugin(ArchitectureConformance):
    plugin = Cases.plugin

    @staticmethod
    def configs():
        return Cases.configs
"""


class Cases:
    """What the test file above is about; set while `check` runs."""

    plugin: ClassVar[str] = ""
    configs: ClassVar[dict[str, Any]] = {}


@dataclass(frozen=True, slots=True)
class Result:
    """One inherited test on one configuration ("" for those about the package).

    Attributes:
        outcome: "passed", "failed", "skipped" or "xfailed".
        message: what is wrong, in one line; `todo`: what to do about it. Both empty where it passed.
    """

    test: str
    case: str
    outcome: str
    seconds: float
    message: str = ""
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """Results of the kit; `cases` are the configurations by name, `left_out` the model types without one, and why."""

    plugin: str
    cases: Mapping[str, Any]
    left_out: Mapping[str, str]
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        return bool(self.cases) and all(one.outcome != "failed" for one in self.results)


def check(name: str, *, configs: Sequence[Path] = ()) -> Checked:
    """Run the conformance kit on the installed plugin `name`.

    Args:
        name: entry-point name or distribution.
        configs: model folders, or paths of a config.json, to test instead of the default configurations. A large one is
            made small.

    Raises:
        ConfigError: no such plugin. PluginError: it does not load, or pytest is not installed.
    """
    try:
        import pytest
    except ImportError as error:
        raise PluginError("the conformance kit needs pytest", hint="pip install pytest") from error
    manager = default_manager()
    info = manager.find(name)
    owners = [owner for owner in manager.architectures if owner.plugin == info.name]
    if info.state != "ok" or not owners:
        raise PluginError(f"{info.label} {info.state}: {info.error or 'it brings no architecture'}")
    given = _given(manager, configs) if configs else _defaults(manager, owners)
    cases = {case: config for case, config in given.items() if not isinstance(config, str)}
    left_out = {case: why for case, why in given.items() if isinstance(why, str)}
    collected = _Collector()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test_plugin.py").write_text(TEST_FILE, encoding="utf-8")
        options = ["-p", "no:terminal", "-p", "no:cacheprovider", "-p", "awq_core.testing.pytest_plugin"]
        options += ["--import-mode=importlib", "--rootdir", folder, "-c", os.devnull, folder]
        Cases.plugin, Cases.configs = _module(info.name), cases
        alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": ""}
        with patch.dict(os.environ, alone), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            code = pytest.main(options, plugins=[collected])
    if collected.broken or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        why = collected.broken or f"pytest ended with code {int(code)}"
        raise PluginError(f"{info.label}: the kit could not run: {why}")
    return Checked(info.name, cases, left_out, tuple(collected.results))


def _module(name: str) -> str:
    """Import name of a plugin's module."""
    (entry,) = list(importlib_metadata.entry_points(group=GROUP, name=name))[:1]
    return entry.module


def _defaults(manager: PluginManager, owners: Sequence[Owner]) -> dict[str, Any]:
    """Model type -> small default configuration, or why there is none."""
    found: dict[str, Any] = {}
    for owner in owners:
        for kind in owner.arch.model_types:
            try:
                import_auto_module(owner)
                config = AutoConfig.for_model(kind)
            except Exception as error:
                found[kind] = f"no default configuration: {_line(error).partition('. ')[0]}"
                continue
            found[kind] = smallest_config(config, owner, manager) or "no small model of its default can be built"
    return found


def _given(manager: PluginManager, configs: Sequence[Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in configs:
        folder = path.parent if path.name == "config.json" else path
        config, owner = open_config(folder, manager)
        found[folder.name or config.model_type] = (
            smallest_config(config, owner, manager) or "no small model of it can be built"
        )
    return found


class _Collector:
    """Listens to pytest."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.broken = ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken = _line(report.longrepr)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        test, _, case = report.nodeid.rpartition("::")[2].partition("[")
        outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
        message = _crash(report) if outcome != "passed" else ""
        todo = " ".join(dict(report.sections).get("what to do", "").split()) if outcome == "failed" else ""
        self.results.append(Result(test, case.removesuffix("]"), outcome, report.duration, message, todo))


def _crash(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return _line(crash.message if crash else report.longrepr).removeprefix("AssertionError: ").removeprefix("Failed: ")


def _line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
