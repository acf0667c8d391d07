"""`awq kernels`: which int4 kernels run on this machine, in which dtypes, and why the others do not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from awq_core.cli.output import note, one_line, print_json
from awq_core.hooks.manager import default_manager

if TYPE_CHECKING:
    from awq_core.kernels.survey import Finding


@click.command(
    epilog="""\b
Examples:
  awq kernels
  awq kernels --json
  AWQ_KERNEL=reference awq generate DIR --prompt "def add("
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print data on stdout instead of text.")
def kernels(as_json: bool) -> None:
    """List the int4 kernels: which run here, which is chosen, and why the others are not.

    The C++ kernel for CPUs is compiled by this command where that has not happened yet.
    """
    from awq_core.kernels.survey import survey

    found = survey(default_manager().kernel_backends())
    forced = os.environ.get("AWQ_KERNEL") or None
    if as_json:
        print_json({"forced": forced, "kernels": [asdict(one) for one in found]})
        return
    for line in _table(found):
        click.echo(line)
    if forced:
        note(f"AWQ_KERNEL={forced}: every linear runs on it, or loading fails")


def _table(found: Sequence[Finding]) -> Iterator[str]:
    dtypes = tuple(found[0].reasons)
    rows = [("kernel", "device", *dtypes, "")]
    for one in found:
        states = ("chosen" if name in one.chosen else "no" if why else "yes" for name, why in one.reasons.items())
        rows.append((one.name, one.device or "-", *states, _remark(one)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield "  ".join([*cells, row[-1]]).rstrip()


def _remark(one: Finding) -> str:
    """What the kernel says of itself; then each reason once, with its dtypes where it holds for some and names none."""
    said: dict[str, list[str]] = {}
    for name, why in one.reasons.items():
        if why:
            said.setdefault(why, []).append(name)
    everywhere = len(said) == 1 and len(next(iter(said.values()))) == len(one.reasons)
    reasons = [why if everywhere or names[0] in why else f"{' and '.join(names)}: {why}" for why, names in said.items()]
    return one_line("; ".join([*filter(None, [one.detail]), *reasons]))
