"""Units of mixed precision: the linears of a block that engines fuse, and which therefore must share one width.

    q, k, v        read one tensor and become one matmul        one unit
    gate, up       the same                                     one unit
    o    down      alone                                        one unit each
    experts        one kernel for all of a layer's              one unit, with what shares a scale group with them

No names are needed for that: linears that read one tensor are together in a scale group (also in one that is skipped),
and experts are numbered: their names differ in a segment that is a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from awq_core.plan_types import BlockPlan, LinearPlan


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears of one block that are quantized together or not at all."""

    block: str
    linears: tuple[LinearPlan, ...]

    @property
    def weights(self) -> int:
        """Parameters of its linears, biases not counted."""
        return sum(linear.in_features * linear.out_features for linear in self.linears)


def units_of(blocks: Iterable[BlockPlan]) -> tuple[Unit, ...]:
    """The units of all quantized linears, in the order of the plan."""
    return tuple(unit for block in blocks for unit in _units(block))


def _units(block: BlockPlan) -> list[Unit]:
    local = {block.local(linear): linear for linear in block.quantized}
    leader = {name: name for name in local}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    together = [list(group.layers) for group in block.groups] + [list(skip.layers) for skip in block.skipped]
    numbered: dict[str, list[str]] = {}
    for name in local:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
        if number:
            numbered.setdefault(".".join(parts[:number]), []).append(name)
    for names in (*together, *numbered.values()):
        first, *others = [name for name in names if name in local] or [""]
        for other in others:
            leader[find(other)] = find(first)
    members: dict[str, list[LinearPlan]] = {}
    for name, linear in local.items():
        members.setdefault(find(name), []).append(linear)
    return [Unit(block.path, tuple(linears)) for linears in members.values()]


def titles(units: Iterable[Unit]) -> list[str]:
    """What each unit is called within its block: its linears' last names, short: "q+k+v", "o", "gate+up", "down"."""
    lasts = [tuple(dict.fromkeys(linear.name.rpartition(".")[2] for linear in unit.linears)) for unit in units]
    endings = {last[last.rfind("_") :] if "_" in last else "" for names in lasts for last in names}
    ending = endings.pop() if len(endings) == 1 else ""
    return ["+".join(last.removesuffix(ending) for last in names) for names in lasts]
