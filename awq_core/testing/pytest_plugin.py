"""pytest plugin, installed with awq-core: runs every inherited test of `ArchitectureConformance` once a config, and
prints below a failure what to do about it, which is the test's docstring."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any

import pytest

TODO = "what to do"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases: Any = getattr(metafunc.cls, "awq_cases", None)
    if cases is not None and "case" in metafunc.fixturenames:
        configs = cases()
        metafunc.parametrize("case", list(configs.values()), ids=list(configs))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and hasattr(getattr(item, "cls", None), "awq_cases"):
        report.sections.append((TODO, inspect.getdoc(getattr(item, "function", None)) or ""))
    return report
