"""The tables of a report, as words: the same for the page and for the model card."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from awq_core.report import summary
from awq_core.report.record import Record, Row
from awq_core.report.summary import Component
from awq_core.sizes import size_text


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text below a head; `note` is for below the table."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def number(value: float | None) -> str:
    """Four digits, "-" where there is none."""
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def time_text(seconds: float) -> str:
    """ "0.82 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def overview(record: Record) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the run in a few figures."""
    quantized = record.quantized
    weights = sum(row.weights for row in record.rows)
    average = sum(row.bits * row.weights for row in record.rows) / weights if weights else 0.0
    size = f"{record.bytes_after / record.bytes_before:.1%} of {size_text(record.bytes_before)}"
    found = [
        ("size", size_text(record.bytes_after), size if record.bytes_before else ""),
        ("bits a weight", f"{average:.2f}", "of all linears, with scales and zero points"),
        (
            "linears",
            f"{len(quantized)} of {len(record.rows)}",
            f"{record.coverage:.1%} of the quantized blocks' weights",
        ),
    ]
    rtn, ours, share = summary.loss_rtn(quantized), summary.loss(quantized), summary.ratio(quantized)
    if share is not None:
        found.append(("output error", f"{share:.1%}", f"of round-to-nearest's: {number(ours)} for {number(rtn)}"))
    if record.cost:
        found.append(("time", time_text(record.cost.seconds), f"on {record.device}"))
        found.append(("memory", size_text(record.cost.peak), "the most that was held"))
    return found


def facts(record: Record) -> Table:
    """How the model was made, a line a fact."""
    config, given = record.config, record.calibration
    group = config.get("group_size")
    rows = [
        ("made from", record.model),
        ("architecture", f"{record.family}, plugin {record.plugin} of {record.dist}"),
        ("format", f"AWQ gemm, 4-bit codes and zero points, groups of {'a whole row' if group == -1 else group}"),
        ("rounding", f"{config.get('rounding')}; clip {config.get('clip')}"),
        ("calibration", _calibration(given)),
        ("scale groups", f"{record.proof_groups} proved, outputs moved by {record.proof_error:.1e}"),
        ("computed in", f"{record.dtype} on {record.device}"),
    ]
    if record.target:
        rows.append(("target", f"{record.target}: the most sensitive linears were kept"))
    notes = Counter(row.note for row in record.rows if row.note)
    rows += [("rounded otherwise", f"{count} linears: {note}") for note, count in notes.items()]
    rows += [(name, version) for name, version in record.versions.items()]
    return Table(("", ""), tuple(rows))


def blocks(record: Record, component: Component) -> Table:
    """A line a block: errors, shares, time and memory."""
    costs = {block.path: block for block in record.cost.blocks} if record.cost else {}
    columns: list[tuple[str, Callable[[str, list[Row]], str]]] = [
        ("block", lambda path, rows: path),
        ("4-bit linears", lambda path, rows: f"{sum(not row.kept for row in rows)} of {len(rows)}"),
        ("bits a weight", lambda path, rows: number(summary.bits(rows))),
    ]
    if record.calibrated:
        columns += [
            ("error, nearest", lambda path, rows: number(summary.loss_rtn(rows))),
            ("error, written", lambda path, rows: number(summary.loss(rows))),
            ("share", lambda path, rows: percent(summary.ratio(rows))),
            ("groups clipped", lambda path, rows: percent(summary.clipped(rows))),
            ("codes flipped", lambda path, rows: percent(summary.flipped(rows))),
        ]
    if costs:
        columns += [
            ("time", lambda path, rows: time_text(costs[path].seconds) if path in costs else "-"),
            ("memory held", lambda path, rows: size_text(costs[path].held) if path in costs else "-"),
        ]
    return _table(columns, [(path, component.rows(path)) for path in component.blocks])


def linears(component: Component) -> Table:
    """A line a linear; a layer's experts share lines, their errors summed and the rest averaged over their weights."""
    tokens = summary.mean("tokens")
    columns: list[tuple[str, Callable[[str, list[Row]], str]]] = [
        ("linear", lambda name, rows: name + (f" (x{len(rows)})" if len(rows) > 1 else "")),
        ("in x out", lambda name, rows: f"{rows[0].in_features} x {rows[0].out_features}"),
        ("bits", lambda name, rows: number(summary.bits(rows))),
        ("scales", lambda name, rows: "kept" if all(row.kept for row in rows) else _one(row.family for row in rows)),
        ("α", lambda name, rows: number(summary.alpha(rows))),
        ("β", lambda name, rows: number(summary.beta(rows))),
        ("error, nearest", lambda name, rows: number(summary.loss_rtn(rows))),
        ("error, written", lambda name, rows: number(summary.loss(rows))),
        ("share", lambda name, rows: percent(summary.ratio(rows))),
        ("clipped", lambda name, rows: percent(summary.clipped(rows))),
        ("flipped", lambda name, rows: percent(summary.flipped(rows))),
        ("masked", lambda name, rows: percent(summary.masked(rows))),
        ("tokens", lambda name, rows: "-" if tokens(rows) is None else f"{tokens(rows):.0f}"),
    ]
    lines = []
    for block in component.blocks:
        for kind in component.kinds:
            if rows := component.cells.get((kind, block)):
                lines.append((rows[0].name if len(rows) == 1 else f"{block}.{kind}", rows))
    return _table(columns, lines)


def experts(record: Record) -> Table | None:
    """A line a mixture: how the calibration tokens were spread over its experts; None without a mixture."""
    found = summary.mixtures(record)
    if not found:
        return None
    rows = [
        (
            one.path,
            f"{len(one.tokens)}",
            f"{min(one.tokens)}",
            f"{statistics.median(one.tokens):g}",
            f"{max(one.tokens)}",
            f"{sum(count == 0 for count in one.tokens)}",
            f"{one.short}",
        )
        for one in found
    ]
    head = ("mixture", "experts", "fewest tokens", "median", "most", "sent none", "fewer than inputs")
    note = "An expert with fewer tokens than inputs leans on the statistics of all tokens; more samples would help."
    return Table(head, tuple(rows), note if any(one.short for one in found) else "")


def kept(record: Record) -> Table:
    """What stayed as it was, and why."""
    reasons: dict[str, list[str]] = {}
    for row in record.rows:
        if row.kept:
            reasons.setdefault(row.kept, []).append(row.name)
    rows = [
        (f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}", why) for why, names in reasons.items()
    ]
    return Table(("what", "why"), (*rows, ("embeddings and norms", "they are no linears")))


def _calibration(given: dict[str, Any]) -> str:
    texts = []
    if "samples" in given:
        texts.append(f"{given['samples']} samples, {given.get('tokens')} tokens: {given.get('source')}")
    if isinstance(mixture := given.get("mixture"), dict):
        texts.append(", ".join(f"{name} {tokens} tokens" for name, tokens in mixture.items()))
    if given.get("reused"):
        texts.append("scales of an earlier run")
    return "; ".join(texts) or "none"


def _one(values: object) -> str:
    found = sorted(set(values))  # type: ignore[call-overload]
    return str(found[0]) if len(found) == 1 else "various"


def _table(
    columns: Sequence[tuple[str, Callable[[str, list[Row]], str]]], lines: Sequence[tuple[str, list[Row]]]
) -> Table:
    head = tuple(name for name, _ in columns)
    return Table(head, tuple(tuple(cell(name, rows) for _, cell in columns) for name, rows in lines))
