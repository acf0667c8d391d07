"""`awq plugins check`: the conformance kit on an installed plugin, without a test file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from awq_core.cli.options import json_option
from awq_core.cli.output import duration, note, plural, print_json
from awq_core.errors import PluginError

if TYPE_CHECKING:
    from awq_core.testing.check import Checked, Result


@click.command(
    "check",
    epilog="""\b
Examples:
  awq plugins check FAMILY
  awq plugins check FAMILY --config MODEL --json
\b
Needs pytest. Without --config, every claimed model type is tested on its
default configuration, made small; weights are random. Exit code 4: a test
failed.
""",
)
@click.argument("name")
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Model folder or config.json to test instead; made small. May be repeated.",
)
@json_option
def check_command(name: str, configs: tuple[Path, ...], as_json: bool) -> None:
    """Run the conformance kit on the plugin NAME (or distribution NAME)."""
    from awq_core.testing.check import check

    note(f"checking {name}: a few seconds a model type")
    checked = check(name, configs=configs)
    if as_json:
        print_json(
            {
                "plugin": checked.plugin,
                "passed": checked.passed,
                "cases": list(checked.cases),
                "left_out": checked.left_out,
                "results": [asdict(one) for one in checked.results],
            }
        )
    else:
        for line in _table(checked):
            click.echo(line)
    failed = sum(one.outcome == "failed" for one in checked.results)
    if failed:
        raise PluginError(f"{name} fails {plural(failed, 'test')} of the conformance kit")
    if not checked.passed:
        raise PluginError(f"{name}: no model could be tested", hint="--config MODEL")


def _table(checked: Checked) -> Iterator[str]:
    """One row a test, and below it each failure, its message and what to do."""
    tests: dict[str, list[Result]] = {}
    for one in checked.results:
        tests.setdefault(one.test.removeprefix("test_"), []).append(one)
    width = max(map(len, tests), default=0)
    for test, results in tests.items():
        outcomes = [one.outcome for one in results]
        state = next((o for o in ("failed", "passed", "xfailed", "skipped") if o in outcomes), "")
        cases = [one.case for one in results if one.outcome == state and one.case]
        shown = "the package" if not cases else ", ".join(cases) if state == "failed" else plural(len(cases), "case")
        yield f"{state:<8} {test:<{width}}  {shown}  ({duration(sum(one.seconds for one in results))})"
        for one in results:
            if one.outcome == "failed":
                yield f"         {one.case + ': ' if one.case else ''}{one.message}"
        if state == "failed":
            yield f"         {next(one.todo for one in results if one.outcome == 'failed')}"
    yield f"cases    {', '.join(checked.cases) or 'none'}"
    for kind, why in checked.left_out.items():
        yield f"left out {kind}: {why}; give one with --config"
