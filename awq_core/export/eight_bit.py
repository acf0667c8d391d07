"""Kept linears in 8 bits, which compressed-tensors holds beside those of 4: which of them, and how they are rounded.

    Δ = (hi − lo) / 255      z = round(−lo / Δ)      q = clamp(round(w / Δ) + z, 0, 255)      ŵ = (q − z) · Δ

on the full range of a group, zero included. With 256 levels rounding to the nearest is close to lossless, so there is
nothing to calibrate.

What may be chosen are the linears that a run could have quantized, as the plugin of the model plans them: no router, no
linear whose weight the model reads instead of calling it. Those that engines fuse (q/k/v, gate/up, the experts of a
layer) share one precision: one of them takes the others along (`units`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from awq_core.checkpoint.format import SCALE_DTYPES
from awq_core.config import QuantConfig
from awq_core.errors import ConfigError, NumericsError
from awq_core.export.source import Source
from awq_core.hooks.manager import default_manager
from awq_core.inference import infer_unknown
from awq_core.model_folder import Claim, claimant
from awq_core.plan_types import Plan
from awq_core.planning import make_plan
from awq_core.units import units_of

EVERYTHING = "*"
LEVELS = 255
SMALLEST_STEP = 2.0**-20  # which float16 holds with a few bits of precision


@dataclass(frozen=True, slots=True)
class EightBit:
    """One linear: codes uint8 `[out, in]`, zero points uint8 and scales `[out, groups]`."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kept linears that share one precision.

    Attributes:
        linears: name in the model -> name on disk.
        starred: whether "*" means them.
        whole: whether only a full name does.
    """

    linears: Mapping[str, str]
    starred: bool
    whole: bool

    def meant(self, name: str) -> bool:
        """Whether `name` means them, by either of the names of one of them."""
        if name == EVERYTHING:
            return self.starred
        both = [one for pair in self.linears.items() for one in pair]
        return name in both if self.whole else name != "" and any(name in one for one in both)


def choose(source: Source, names: Sequence[str]) -> dict[str, str]:
    """The kept linears that `names` mean, name on disk -> name in the model.

    Args:
        names: parts of the names of linears in blocks; full names of linears outside; "*" for all those in blocks of
            the components that were quantized.

    Raises:
        ConfigError: a name means no kept linear, or one that cannot be in 8 bits; says why.
        UnsupportedModelError: no plugin claims the model, and nothing can be proved of it.
    """
    plan, quantized = _plan(source), set(source.linears.values())
    candidates = _candidates(source, plan, quantized)
    chosen: dict[str, str] = {}
    for name in names:
        found = [one for one in candidates if one.meant(name)]
        if not found:
            raise ConfigError(f"--eight-bit {name}: {_why(plan, quantized, name)}", hint="name linears that were kept")
        chosen |= {on_disk: path for one in found for path, on_disk in one.linears.items()}
    shared = _shared(source)
    for path in chosen.values():
        if other := shared.get(f"{path}.weight"):
            raise ConfigError(f"--eight-bit: {path} shares its weight with {other}, which stays", hint="leave it out")
    return chosen


def nearest(name: str, weight: torch.Tensor, group_size: int) -> EightBit:
    """Round a weight `[out, in]`; the scales are in its dtype where engines read that, else in float16.

    Raises:
        NumericsError: the step of a group is too large for that.
    """
    dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float16
    groups = weight.float().unflatten(-1, (-1, group_size))
    lo, hi = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((hi - lo) / LEVELS).clamp(min=SMALLEST_STEP).to(dtype)
    if not bool(torch.isfinite(scales).all()):
        raise NumericsError(f"{name}: scales of 8 bits overflow {dtype}", hint="leave it in 16 bits")
    step = scales.float()
    zeros = (-lo / step).round_().clamp_(0, LEVELS)
    codes = (groups / step.unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, LEVELS)
    return EightBit(codes.flatten(1).to(torch.uint8), zeros.to(torch.uint8), scales)


def _plan(source: Source) -> Plan:
    """What a run could quantize at most: every component, and groups that divide every width."""
    manager = default_manager()
    owner = claimant(source.raw, manager, source.plugin)
    if owner is None:
        found = infer_unknown(source.folder, manager, trust_remote_code=source.code)
        assert found is not None, "nobody claims it"
        manager = found.manager()
        owner = manager.owner(Claim(source.raw))
    components = {stack.component: "4bit" for stack in manager.layer_stacks(owner, source.model)}
    config = QuantConfig(group_size=-1, scale=False, clip="none", components=components)
    return make_plan(source.model, owner, manager, config)


def _candidates(source: Source, plan: Plan, quantized: set[str]) -> list[Candidate]:
    """What may be chosen, in the order of the model."""
    worked = {block.component for block in plan.blocks if any(one.name in quantized for one in block.linears)}
    starred = {block.path for block in plan.blocks if block.component in worked}
    groups = [([one.name for one in unit.linears], unit.block in starred, False) for unit in units_of(plan.blocks)]
    groups += [([one.name], False, True) for one in plan.outside]
    found = []
    for paths, star, whole in groups:
        kept = {path: f"{path}.weight" for path in paths if path not in quantized}
        linears = {path: source.stored.get(name, name).removesuffix(".weight") for path, name in kept.items()}
        found += [Candidate(linears, star, whole)] if linears else []
    return found


def _shared(source: Source) -> dict[str, str]:
    """Parameters that are one tensor with another, and the name of that."""
    names: dict[int, list[str]] = {}
    for name, parameter in source.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {one: other for same in names.values() for one in same for other in same if one != other}


def _why(plan: Plan, quantized: set[str], name: str) -> str:
    """Why a name means nothing."""
    if not name:
        return "no name is empty"
    outside = {linear.name for linear in plan.outside}
    for linear in plan.linears:
        if name in linear.name and linear.name in quantized:
            return f"{linear.name} is in 4 bits"
        if name in linear.name:
            return f"{linear.name} is kept: {linear.reason}" if linear.name not in outside else f"say {linear.name}"
    return "no linear of the blocks was kept" if name == EVERYTHING else "no linear has that in its name"
