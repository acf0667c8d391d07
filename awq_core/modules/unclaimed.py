"""Weights that become linears without a plugin: where shapes say how, and transformers says the names on disk.

Two forms need no description. `Conv1D` is a linear lying on its side. And a stack of experts with `gate_up_proj`
`[E, 2·I, H]`, `down_proj` `[E, H, I]` and `act_fn` is what `unstack_experts` takes apart; what its linears are called
on disk stands in transformers' own rules for merging them,

    ".experts.*.w1.weight", ".experts.*.w3.weight"  ->  ".experts.gate_up_proj"

Whether the linears compute what the stack did is not known from this: inference compares the outputs of both models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from awq_core.modules.experts import unstack_experts
from awq_core.modules.transposed import linear_conv1d


@dataclass(frozen=True, slots=True)
class Stacked:
    """One kind of stack: the end of its path ("mlp.experts"), and the names of gate, up and down on disk."""

    suffix: str
    names: tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was replaced by linears."""

    stacked: tuple[Stacked, ...] = ()
    conv1d: bool = False

    def __bool__(self) -> bool:
        return bool(self.stacked) or self.conv1d


def prepare_unclaimed(model: nn.Module) -> Prepared:
    """Replace in place what can be without a plugin's help; says what that was."""
    stacked = stacked_experts(model)
    for one in stacked:
        unstack_experts(model, one.suffix, one.names)
    return Prepared(stacked, linear_conv1d(model))


def stacked_experts(model: nn.Module) -> tuple[Stacked, ...]:
    """The stacks of a model that can be taken apart under the names they have on disk."""
    merged = dict(_merges(model))
    found: dict[str, Stacked] = {}
    for path, module in model.named_modules():
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        parts = [one for one in (gate_up, down) if isinstance(one, nn.Parameter) and one.ndim == 3]
        if len(parts) < 2 or not hasattr(module, "act_fn") or len(list(module.parameters(recurse=False))) != 2:
            continue
        (count, double, hidden), (also, out, inner) = parts[0].shape, parts[1].shape
        leaf = path.rpartition(".")[2]
        names = (*merged.get(f"{leaf}.gate_up_proj", ()), *merged.get(f"{leaf}.down_proj", ()))
        if (also, double, out) == (count, 2 * inner, hidden) and len(names) == 3:
            suffix = ".".join(path.split(".")[-2:])
            found[suffix] = Stacked(suffix, (names[0], names[1], names[2]))
    return tuple(found.values())


def _merges(model: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """ "experts.gate_up_proj" -> ("w1", "w3"), for each parameter that loading merges out of one linear an expert."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for rule in get_model_conversion_mapping(model):
        if isinstance(rule, WeightConverter) and len(rule.target_patterns) == 1:
            ends = [source.replace("\\", "").removesuffix("$").split(".") for source in rule.source_patterns]
            if all(len(end) > 3 and end[-1] == "weight" and "*" in end for end in ends):
                target = ".".join(rule.target_patterns[0].replace("\\", "").removesuffix("$").split(".")[-2:])
                yield target, tuple(end[-2] for end in ends)
