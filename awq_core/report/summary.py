"""The linears of a run, summed up by block and by kind: a table of kinds by blocks is what the plots draw.

    model.layers.3.mlp.experts.17.up_proj     block "model.layers.3", kind "mlp.experts.*.up_proj"

so that a layer's experts are one cell. Errors of a cell are summed; exponents and shares are means over its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from awq_core.report.record import Record, Row

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a path segment that is a number
Cells = dict[tuple[str, str], list[Row]]
Value = Callable[[Sequence[Row]], float | None]


@dataclass(frozen=True, slots=True)
class Component:
    """The part of a model that has one stack of blocks, or what lies outside of all: names of its blocks and kinds in
    the model's order, and the linears of each (kind, block)."""

    name: str
    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: Cells

    def table(self, value: Value) -> list[list[float | None]]:
        """`value` of every cell, a row a kind; None where there is no such linear."""
        return [[value(self.cells.get((kind, block), [])) for block in self.blocks] for kind in self.kinds]

    def rows(self, block: str) -> list[Row]:
        return [row for kind in self.kinds for row in self.cells.get((kind, block), [])]


@dataclass(frozen=True, slots=True)
class Mixture:
    """Calibration tokens that one layer's experts were sent, in the experts' order; `short` counts the experts with
    fewer than their linears have inputs, whose statistics lean on those of all tokens."""

    path: str
    tokens: tuple[int, ...]
    short: int


def components(record: Record) -> list[Component]:
    """The components in the model's order, those where something is quantized."""
    cells: dict[str, Cells] = {}
    for row in record.rows:
        cells.setdefault(row.component, {}).setdefault((kind(row), row.block), []).append(row)
    found = []
    for name, inside in cells.items():
        blocks, kinds = (tuple(dict.fromkeys(key[i] for key in inside)) for i in (1, 0))
        if any(not row.kept for rows in inside.values() for row in rows):
            found.append(Component(name, blocks, kinds, inside))
    return found


def kind(row: Row) -> str:
    """The linear's path in its block, experts' and other numbers left open."""
    return NUMBER.sub("*", row.name.removeprefix(f"{row.block}."))


def labels(blocks: Sequence[str]) -> list[str]:
    """What tells blocks apart: their number, or the last word of their path."""
    return [next(iter(reversed(NUMBER.findall(block))), block.rpartition(".")[2]) for block in blocks]


def mixtures(record: Record) -> list[Mixture]:
    """Layers whose experts were counted, in the model's order."""
    routed: dict[str, dict[str, tuple[int, int]]] = {}
    for row in record.rows:
        if row.routed is not None:
            expert = row.name.rpartition(".")[0]
            _, width = routed.setdefault(expert.rpartition(".")[0], {}).get(expert, (0, 0))
            routed[expert.rpartition(".")[0]][expert] = (row.routed, max(width, row.in_features))
    return [
        Mixture(path, tuple(tokens for tokens, _ in found.values()), sum(n < width for n, width in found.values()))
        for path, found in routed.items()
    ]


def loss(rows: Iterable[Row]) -> float | None:
    """Output error as it is written, summed; None where it was not measured."""
    return _sum(row.loss for row in rows if not row.kept)


def loss_rtn(rows: Iterable[Row]) -> float | None:
    """Output error of round-to-nearest, summed."""
    return _sum(row.loss_rtn for row in rows if not row.kept)


def ratio(rows: Sequence[Row]) -> float | None:
    """Output error as a share of round-to-nearest's."""
    ours, rtn = loss(rows), loss_rtn(rows)
    return None if ours is None or not rtn else ours / rtn


def mean(field: str, among: Callable[[Row], bool] = lambda row: not row.kept) -> Value:
    """Mean of a field over the weights of the linears that count; None where none does."""

    def value(rows: Sequence[Row]) -> float | None:
        counted = [row for row in rows if among(row)]
        weights = sum(row.weights for row in counted)
        return sum(getattr(row, field) * row.weights for row in counted) / weights if weights else None

    return value


bits = mean("bits", lambda row: True)
clipped = mean("clipped")
flipped = mean("flipped")
masked = mean("masked")
alpha = mean("alpha", lambda row: row.searched)
beta = mean("beta", lambda row: row.searched)


def _sum(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if not found or None in found else sum(one for one in found if one is not None)
