"""The section of the model card that a report fills, between two marks: what was written around it stays.

Names come from models and files, and a model card is markdown that may be shown as a web page: what means something in
markdown or HTML is escaped.
"""

from __future__ import annotations

import re
from pathlib import Path

from awq_core.checkpoint.disk import disk_errors, write_whole
from awq_core.report import evaluations, summary, tables
from awq_core.report.record import RECORD, Record
from awq_core.report.tables import Table

CARD = "README.md"
BEGIN, END = "<!-- awq report -->", "<!-- end of awq report -->"
MOST_BLOCKS = 12


def section(record: Record) -> str:
    """The section, marks included; without time and memory, so that it is as reproducible as the weights."""
    parts = ["## What quantization did"]
    for document in record.evaluations:
        parts += [f"Measured on {escaped(evaluations.title(document))}:", markdown(evaluations.table(document))]
    if record.calibrated:
        parts.append(
            "Output error of each block's linears on the calibration tokens, summed, beside that of round-to-nearest:"
        )
        rows = [(block, part.rows(block)) for part in summary.components(record) for block in part.blocks]
        rows = [(block, of) for block, of in rows if summary.ratio(of) is not None]
        lines: list[tuple[str, ...]] = [
            (
                block,
                tables.number(summary.loss_rtn(of)),
                tables.number(summary.loss(of)),
                tables.percent(summary.ratio(of)),
                tables.number(summary.alpha(of)),
                tables.percent(summary.clipped(of)),
                tables.percent(summary.flipped(of)),
            )
            for block, of in rows
        ]
        head: tuple[str, ...] = ("block", "nearest", "written", "share", "mean α", "groups clipped", "codes flipped")
        if len(lines) > MOST_BLOCKS:
            lines = [*lines[: MOST_BLOCKS // 2], ("...",) * len(head), *lines[-MOST_BLOCKS // 2 :]]
        parts.append(markdown(Table(head, tuple(lines))))
    if experts := tables.experts(record):
        parts += ["Calibration tokens by expert:", markdown(experts)]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    parts.append(
        escaped(f"Made with {versions}.") + f" Every linear is in `{RECORD}`; `awq report DIR` makes a page of it."
    )
    return "\n\n".join([BEGIN, *parts, END])


def update_card(folder: Path, record: Record) -> bool:
    """Bring the section in the folder's model card up to date; False where the card has none (any more).

    Raises:
        OutputError: the card cannot be written.
    """
    path = folder / CARD
    with disk_errors(folder):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            return False
        new = before + section(record) + after
        if new != text:
            write_whole(path, new.encode())
    return True


def markdown(table: Table) -> str:
    """A table in markdown, its note below."""
    head, *lines = (f"| {' | '.join(map(escaped, cells))} |" for cells in (table.head, *table.rows))
    text = "\n".join([head, f"|{'---|' * len(table.head)}", *lines])
    return f"{text}\n\n{escaped(table.note)}" if table.note else text


def escaped(text: str) -> str:
    """Text that is nothing but text in markdown: on one line, and no tags, links, tables or code."""
    return re.sub(r"([\\`*_{}\[\]<>|#$&])", r"\\\1", " ".join(text.split()))
