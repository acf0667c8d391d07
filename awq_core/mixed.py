"""Mixed precision inside an AWQ checkpoint: some units in 4 bits, the others left as they are, to a size asked for.

The format holds one quantized width, so a unit (`awq_core.units`) has 4 bits or stays in 16, and which stay is a list
of names: `modules_to_not_convert`. Asked for is one of

    target_bits    stored bits a weight, averaged over the linears chosen among; scales and zero points count:
                   4 + (16 + 4) / 128 = 4.156 in groups of 128
    target_size    bytes of all weights of the checkpoint, those that are never quantized included

and met from below, within one unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from awq_core.allocation import allocate
from awq_core.config import QuantConfig
from awq_core.errors import ConfigError, PlanError
from awq_core.plan_types import BlockPlan, Plan, prefixes
from awq_core.planning import saved_bytes
from awq_core.sizes import parse_size, size_text
from awq_core.units import Unit, titles, units_of

COMPONENT = "language"


@dataclass(frozen=True, slots=True)
class Target:
    """What was asked for: one of `bits` a weight and `size` in bytes."""

    bits: float | None = None
    size: int | None = None

    @classmethod
    def of(cls, bits: float | None, size: str | float | None) -> Target | None:
        """From what a caller gives; None where neither is given.

        Raises:
            ConfigError: both are given, or the size is none.
        """
        if bits is None and size is None:
            return None
        if bits is not None and size is not None:
            raise ConfigError("target_bits and target_size are both given", hint="one of them decides the other")
        return cls(bits, None if size is None else parse_size(size))

    def __str__(self) -> str:
        return f"{self.bits:g} bits" if self.size is None else size_text(self.size)


@dataclass(frozen=True, slots=True)
class Choice:
    """One unit's fate. `cost` is the KL divergence, in nats a token, that 4 bits in it alone are expected to bring;
    `kept` says whether it stays as it is."""

    unit: Unit
    title: str
    cost: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Allocation:
    """The choice: units in the order of the model, the bits a weight and the bytes of the checkpoint they come to."""

    target: Target
    choices: tuple[Choice, ...]
    bits: float
    size: int

    @property
    def kept(self) -> int:
        """How many units stay as they are."""
        return sum(choice.kept for choice in self.choices)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        units = [
            {
                "block": choice.unit.block,
                "unit": choice.title,
                "linears": [linear.name for linear in choice.unit.linears],
                "sensitivity": choice.cost,
                "bits": 16 if choice.kept else 4,
            }
            for choice in self.choices
        ]
        return {"target": str(self.target), "bits": round(self.bits, 4), "size": self.size, "units": units}


def language_blocks(plan: Plan) -> tuple[BlockPlan, ...]:
    """The blocks chosen among: those of the one stack that leads to the logits.

    Raises:
        PlanError: the component "language" is several stacks, or none.
    """
    blocks = tuple(block for block in plan.blocks if block.component == COMPONENT)
    stacks = {block.path.rpartition(".")[0] for block in blocks}
    if len(stacks) != 1:
        raise PlanError(
            f"mixed precision needs one stack of language blocks, this model has {len(stacks)}",
            hint="choose by hand what stays as it is: --keep NAME",
        )
    return blocks


def room(plan: Plan, target: Target, itemsize: int) -> int:
    """Bytes that the target leaves for units that stay as they are.

    Args:
        plan: with every unit quantized.
        itemsize: bytes of one stored weight.

    Raises:
        ConfigError: nothing reaches the target; says between which values it may lie.
    """
    units = units_of(language_blocks(plan))
    extra = sum(_extra(unit, itemsize) for unit in units)
    left: float
    if target.size is not None:
        least, most = size_text(plan.bytes_after), size_text(plan.bytes_after + extra)
        left = target.size - plan.bytes_after
    else:
        weights = sum(unit.weights for unit in units)
        small = weights * itemsize - extra
        least, most = f"{small * 8 / max(weights, 1):.3f} bits", f"{itemsize * 8} bits"
        left = (target.bits or 0.0) * weights / 8 - small + 1e-6
    if not 0 <= left < extra:
        what = "as much as no quantization takes" if left >= 0 else "less than all units in 4 bits take"
        raise ConfigError(f"a target of {target} is {what}", hint=f"from {least} to less than {most} is possible")
    return int(left)


def choose(plan: Plan, target: Target, sensitivity: Mapping[str, float], itemsize: int) -> Allocation:
    """Decide which units stay as they are.

    Args:
        plan: with every unit quantized.
        sensitivity: by name of linear, see `awq_core.quantization.sensitivity`.
        itemsize: bytes of one stored weight.

    Raises:
        ConfigError: nothing reaches the target.
    """
    units = units_of(language_blocks(plan))
    cost = [sum(sensitivity[linear.name] for linear in unit.linears) for unit in units]
    extra = [_extra(unit, itemsize) for unit in units]
    kept = allocate(cost, extra, room(plan, target, itemsize))
    added = sum(more for more, one in zip(extra, kept, strict=True) if one)
    weights = sum(unit.weights for unit in units)
    bits = (weights * itemsize - sum(extra) + added) * 8 / weights
    choices = tuple(Choice(*row) for row in zip(units, titles(units), cost, kept, strict=True))
    return Allocation(target, choices, bits, plan.bytes_after + added)


def keeping(plan: Plan, allocation: Allocation) -> QuantConfig:
    """The plan's configuration with the kept units named in `modules_to_not_convert`: it makes the same choice again
    without any target."""
    kept = [linear.name for choice in allocation.choices if choice.kept for linear in choice.unit.linears]
    quantized = _quantized(plan) - set(kept)
    names = (*plan.config.modules_to_not_convert, *prefixes(kept, quantized))
    return replace(plan.config, modules_to_not_convert=names)


def verify(plan: Plan, mixed: Plan, allocation: Allocation) -> None:
    """Refuse a plan made with `keeping` that is not the allocation.

    Raises:
        PlanError: names of one component occur in those of another.
    """
    kept = {linear.name for choice in allocation.choices if choice.kept for linear in choice.unit.linears}
    odd = sorted(_quantized(mixed) ^ (_quantized(plan) - kept))
    if odd:
        raise PlanError(f"what stays as it is cannot be named apart from {odd[0]}", hint="choose by hand: --keep NAME")


def _quantized(plan: Plan) -> set[str]:
    return {linear.name for linear in plan.linears if linear.quantize}


def _extra(unit: Unit, itemsize: int) -> int:
    """Bytes that the unit takes more where it stays as it is."""
    return sum(saved_bytes(linear, itemsize) for linear in unit.linears)
