"""Who reads what a norm or a linear writes: proposed from one run, proved by another.

    readers = {}
    repeat:  fold 1/s into P and s into the readers;  add every module whose input became x / s
    until none is added;  P and its readers are a scale group if the logits have not moved

The loop is needed because readers stand in each other's way: until the router is multiplied by s, tokens go to other
experts, and the experts' inputs cannot be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from awq_core.inference.heads import HeadSizes
from awq_core.inference.paths import pattern, siblings
from awq_core.inference.trial import Seen, Trial
from awq_core.quantization.proof import TOLERANCE
from awq_core.scale_groups import GroupPlan

OFFSETS = (0.0, 1.0)
DEGREES = (1, 2)  # of what may stand between a linear and its readers: a product or ReLU, and the square of ReLU
MOST_HIDDEN = 3
NOT_CALLED = "it was not called by a pass over text, and stays as it is: its weight may be read without a call"


@dataclass(frozen=True, slots=True)
class Group:
    """One proved group, paths in the block. `head_dim` is the path of the attribute with the size of a head."""

    prev: str
    layers: tuple[str, ...]
    compensate: tuple[str, ...]
    no_clip: tuple[str, ...] = ()
    norm_offset: float = 0.0
    prev_rows: Literal["all", "last", "heads", "kv_heads"] = "all"
    head_dim: str = ""
    degree: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A group that would change the function: its readers, and why."""

    prev: str
    layers: tuple[str, ...]
    why: str


class Search:
    """The groups of one block.

    Args:
        small_outputs: paths of linears with too few outputs to be quantized, in the model as it really is.
    """

    def __init__(self, trial: Trial, small_outputs: frozenset[str] = frozenset(), seed: int = 0) -> None:
        self.trial, self.small = trial, small_outputs
        self.generator = torch.Generator().manual_seed(seed)
        self.linears = {name: one for name, one in trial.modules.items() if isinstance(one, nn.Linear)}
        self.readable = {
            name: one.weight.shape[-1]
            for name, one in trial.modules.items()
            if isinstance(getattr(one, "weight", None), nn.Parameter) and one.weight.ndim >= 2
        }
        self.heads = HeadSizes(trial.block)

    def found(self) -> tuple[list[Group], list[Refused]]:
        """The proved groups, norms first, and those that were refused."""
        groups: list[Group] = []
        refused: list[Refused] = []
        read: set[str] = set()
        pairs: set[str] = set()
        for prev in [*self._norms(), *self._first_of_siblings(reversed(self.linears))]:
            outcome = self._linear(prev) if prev in self.linears else self._norm(prev)
            if isinstance(outcome, Refused):
                refused.append(outcome)
            elif outcome is not None and not read & {*outcome.layers, *outcome.compensate}:
                read |= {*outcome.layers, *outcome.compensate}
                groups.append(outcome)
                pairs |= {outcome.prev} if prev in self.linears else set()
        clipped = [replace(group, no_clip=self._query_and_key(group, pairs)) for group in groups]
        return clipped, [one for one in refused if not set(one.layers) <= read]

    # -- one candidate

    def _norm(self, prev: str) -> Group | Refused | None:
        width = self.trial.modules[prev].weight.numel()
        scale = self._scale(width)
        for offset in OFFSETS:
            plan = GroupPlan(prev, (), (), "", offset, "all")
            if self.trial.writes(self.trial.folded(plan, scale), prev, 1 / scale):
                return self._grown(plan, scale, 1 / scale)
        return None

    def _linear(self, prev: str) -> Group | Refused | None:
        rows = self.linears[prev].out_features
        others = {name: one for name, one in self.linears.items() if name != prev}
        doubled = self.trial.multiplied({prev: 2.0})
        degree = next((n for n in DEGREES if any(self.trial.reads(doubled, name, 2.0**n) for name in others)), 0)
        reading = [one for name, one in others.items() if degree and self.trial.reads(doubled, name, 2.0**degree)]
        widths = {one.in_features for one in reading or others.values() if reading or one.in_features < rows}
        refused: Refused | None = None
        for width in sorted(widths):
            for plan, size in self.heads.folds(prev, rows, width):
                own = self._scale(width // plan.shared.repeats if plan.shared else width)
                scale = plan.shared.spread(own) if plan.shared else own
                outcome = self._grown(replace(plan, degree=degree or 1), scale, 1 / scale)
                if isinstance(outcome, Group):
                    size = size or self.heads.of(prev)
                    return replace(outcome, prev_rows=cast(Any, plan.prev_rows), head_dim=size, degree=degree or 1)
                refused = refused or outcome
        return refused

    def _grown(self, plan: GroupPlan, scale: torch.Tensor, factor: torch.Tensor) -> Group | Refused | None:
        """The group of `plan` with all its readers, if that is what they are; None where nothing reads."""
        names: list[str] = []
        alike = "*" in pattern(plan.prev, self.trial.block)
        while True:
            seen = self.trial.folded(replace(plan, layers=tuple(names)), scale)
            new = [
                name
                for name, width in self.readable.items()
                if name not in names and width == scale.numel() and self.trial.reads(seen, name, factor)
            ]
            if not alike:  # what one expert's linear writes, only that expert reads
                new = list(dict.fromkeys(other for name in new for other in self._siblings(name)))
            new = [name for name in new if name not in names]
            if not new:
                break
            names += new
        layers = [name for name in names if name in self.linears]
        if not layers:
            return None
        error = seen.error(self.trial.base)
        if error > TOLERANCE:
            compensated, why = self._hidden(replace(plan, layers=tuple(names)), scale, error)
            if why:
                return Refused(plan.prev, tuple(layers), f"scaling {plan.prev} changes the function: {why}")
            names += compensated
        kept = [name for name in names if name not in self.linears or self._chooses(name)]
        layers = [name for name in names if name not in kept]
        return Group(plan.prev, tuple(layers), tuple(kept), (), plan.norm_offset) if layers else None

    def _hidden(self, plan: GroupPlan, scale: torch.Tensor, error: float) -> tuple[list[str], str]:
        """Parameters outside every module that was called with the tensor, found by what they mend: the modules that
        `compensate` reaches, or why the group must go."""
        taken = {f"{name}.weight" for name in (*self.linears, *plan.layers)}
        tried = [
            (name, axis)
            for name, parameter in self.trial.block.named_parameters()
            if name not in taken and parameter.ndim >= 2
            for axis, length in enumerate(parameter.shape)
            if length == scale.numel()
        ]
        mended: tuple[tuple[str, int], ...] = ()
        while error > TOLERANCE and len(mended) < MOST_HIDDEN and tried:
            errors = [self.trial.folded(plan, scale, (*mended, one)).error(self.trial.base) for one in tried]
            best = min(range(len(tried)), key=errors.__getitem__)
            if not errors[best] < 0.98 * error:
                break
            mended, error = (*mended, tried.pop(best)), errors[best]
        if error > TOLERANCE:
            return [], "something that is neither a linear nor a parameter reads it too, such as a residual"
        names = []
        for name, axis in mended:
            shape = tuple(self.trial.block.get_parameter(name).shape)
            if not name.endswith(".weight") or axis != len(shape) - 1 or name.count(".") == 0:
                return [], f"the parameter {name} {list(shape)} reads it too, and is no linear's weight"
            names.append(name.removesuffix(".weight"))
        return names, ""

    # -- what kind of reader

    def _chooses(self, name: str) -> bool:
        """Whether a linear must stay exact: its outputs are sorted to choose experts, or too few to be quantized."""
        if name in self.small:
            return True
        base = self.trial.base
        if self.linears[name].out_features not in {one.shape[-1] for one in base.chosen}:
            return False
        chosen = self.trial.multiplied({name: 1.5}, choices=True).chosen
        return any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(chosen, base.chosen, strict=False))

    def _query_and_key(self, group: Group, absorbing: set[str]) -> tuple[str, ...]:
        """Readers whose outputs meet in a product before a softmax: doubling one and halving the other changes nothing,
        or doubling one alone, where each is normalised before. Not so gate and up, of which one is linear."""
        names = [name for name in group.layers if name not in absorbing and len(self._siblings(name)) == 1]
        if len(names) < 2:
            return ()
        base = self.trial.base

        def same(factors: dict[str, float]) -> bool:
            return self.trial.multiplied(factors).error(base) <= TOLERANCE

        alone = {name for name in names if same({name: 2.0})}
        if len(alone) > 1:
            return tuple(name for name in names if name in alone)
        for index, one in enumerate(names):
            for other in names[index + 1 :]:
                if same({one: 2.0, other: 0.5}):
                    return (one, other)
        return ()

    # -- small questions

    def _scale(self, width: int) -> torch.Tensor:
        return torch.exp(0.7 * torch.randn(width, generator=self.generator))

    def _norms(self) -> Iterator[str]:
        """Called modules with one weight a channel and nothing below that has parameters."""
        for name, module in self.trial.modules.items():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 1 and name in self.trial.base.outputs:
                yield name

    def _first_of_siblings(self, names: Any) -> Iterator[str]:
        """Experts are alike: of each set, the first that any token was sent to."""
        done: set[str] = set()
        for name in names:
            if name not in done and name in self.trial.base.inputs:
                done |= set(self._siblings(name))
                yield name

    def _siblings(self, name: str) -> list[str]:
        return siblings(name, self.readable, self.trial.block)


def unreached(seen: Seen, name: str) -> str:
    """Why nothing can be folded before a linear that is in no group, as far as the run shows."""
    if name not in seen.inputs:
        return NOT_CALLED
    writer = seen.writers.get(name, "")
    return (
        f"it reads the output of {writer}, which no scale passes through"
        if writer
        else ("its input is computed, not the output of a norm or a linear")
    )
