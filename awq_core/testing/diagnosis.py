"""Why the proof of a plugin failed, in one line that names the module to write into the plugin, or out of it.

    fold s into one group at a time, until the logits move     ->  the group at fault
    in that run, every module whose input became x / s         ->  who really reads what `prev` writes

A module that reads it and is not listed is a forgotten reader; one that is listed and does not is a wrong one. If all
readers are right, the fold of `prev` itself is wrong (`norm_offset`, `prev_rows`), or what else reads it is no module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from awq_core.hooks.manager import Owner, PluginManager
from awq_core.inference.readers import Group, Search
from awq_core.inference.trial import Seen, Trial
from awq_core.quantization.fold import tied
from awq_core.quantization.proof import TOLERANCE, resolved, sample_batches, tiny_model
from awq_core.scale_groups import GroupPlan

SHOWN = 3  # modules named in a message; of many experts the first will do
OFFSETS = (0.0, 1.0)


def diagnose(config: Any, owner: Owner, manager: PluginManager, *, trust_remote_code: bool = False) -> str:
    """What is wrong with the scale groups of `owner` for a tiny model of `config`; empty when each group alone keeps
    the function.

    Raises:
        PlanError: a declared path matches nothing, or no tiny model can be built.
    """
    model = tiny_model(config, owner, manager, trust_remote_code=trust_remote_code)
    batches = list(sample_batches(model, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    trials: dict[nn.Module, Trial] = {}
    for block, group in resolved(model, owner, manager):
        if block not in trials:
            trials[block] = Trial(model, block, batches)
        trial = trials[block]
        scale = torch.exp(
            0.7 * torch.randn(block.get_parameter(f"{group.layers[0]}.weight").shape[-1], generator=generator)
        )
        seen = trial.folded(group, scale)
        if seen.error(trial.base) > TOLERANCE:
            path = next(name for name, module in model.named_modules() if module is block)
            return f"{path}: {_fault(trial, group, scale, seen)}"
    return ""


def _fault(trial: Trial, group: GroupPlan, scale: torch.Tensor, seen: Seen) -> str:
    own, spread = tied(group, scale)
    is_norm = not isinstance(trial.modules[group.prev], nn.Linear)
    if is_norm and not trial.writes(seen, group.prev, 1 / own):
        return _wrong_offset(trial, group, scale)
    listed = {*group.layers, *group.compensate}
    missing = [
        name for name in _readable(trial, spread.numel()) if name not in listed and trial.reads(seen, name, 1 / spread)
    ]
    if missing:
        verb, them = ("reads", "it") if len(missing) == 1 else ("read", "them")
        return (
            f"{_some(missing)} {verb} {group.prev} too; add {them} to layers, or to compensate what must not be "
            "quantized (a router)"
        )
    wrong = [name for name in listed if name in seen.inputs and not trial.reads(seen, name, 1 / spread)]
    if wrong and is_norm:
        verb = "does" if len(wrong) == 1 else "do"
        return (
            f"{_some(wrong)} {verb} not read {group.prev}; take {'it' if len(wrong) == 1 else 'them'} out of its group"
        )
    right = next((one for one in Search(trial).found()[0] if one.prev == group.prev), None)
    if right is not None and not is_norm:
        return f"{group.prev} -> {_some(group.layers)}: {_difference(group, right)}"
    if wrong:
        return (
            f"no scale passes from {group.prev} to {_some(wrong)}: remove the group and write "
            f"{'it' if len(wrong) == 1 else 'them'} into exempt"
        )
    return (
        f"something that is no module reads {group.prev} too, such as a residual or a parameter used without a call; "
        'say prev="" for its readers, or make the parameter a linear in awq_prepare_model'
    )


def _wrong_offset(trial: Trial, group: GroupPlan, scale: torch.Tensor) -> str:
    own = tied(group, scale)[0]
    for offset in OFFSETS:
        if trial.writes(trial.folded(replace(group, norm_offset=offset), scale), group.prev, 1 / own):
            return f"{group.prev} multiplies by {'1 + ' if offset else ''}its weight; set norm_offset={offset}"
    return f"dividing the weight of {group.prev} does not divide its output; is it a norm, and called?"


def _difference(group: GroupPlan, right: Group) -> str:
    """The fields of a linear's group that hold instead."""
    fields = [f"prev_rows={right.prev_rows!r}"] if right.prev_rows != group.prev_rows else []
    fields += [f"degree={right.degree}"] if right.degree != group.degree else []
    fields += [f"head_dim={right.head_dim!r}"] if right.head_dim else []
    return f"the function is kept with {', '.join(fields) or f'layers={right.layers!r}'}"


def _readable(trial: Trial, width: int) -> list[str]:
    """Modules with a weight `[..., width]`."""
    found = []
    for name, module in trial.modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim >= 2 and weight.shape[-1] == width:
            found.append(name)
    return found


def _some(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else ""
    return ", ".join(ordered[:SHOWN]) + more
