"""From declared scale groups to checked ones: globs expanded, shapes compared, impossible folds set aside.

A declaration that cannot be right raises; a group that merely does not apply here (a norm without a weight) is skipped
with its reason.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from awq_core.errors import PlanError
from awq_core.hooks.types import ScaleGroup
from awq_core.shared_heads import SharedHeads, shared_heads


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A scale group with its globs resolved; paths are relative to the block. `shared` says which channels have one
    scale, where `prev` writes fewer than its readers take. They read the last rows of each of its `sections` equal
    parts."""

    prev: str
    layers: tuple[str, ...]
    compensate: tuple[str, ...]
    observe: str
    norm_offset: float
    prev_rows: str
    shared: SharedHeads | None = None
    sections: int = 1
    degree: int = 1


@dataclass(frozen=True, slots=True)
class Skip:
    """A scale group that is not applied, and why. `layers` are its readers: they still share one fate."""

    where: str
    why: str
    layers: tuple[str, ...] = ()


def resolve_groups(
    block: nn.Module, declared: Sequence[ScaleGroup], *, where: str = "block"
) -> tuple[tuple[GroupPlan, ...], tuple[Skip, ...]]:
    """Expand globs and check shapes of the scale groups of one block.

    Raises:
        PlanError: a path that matches nothing in a group that is not optional, a layer in two groups, one `prev` in
            two groups, a norm or a compensated reader whose width is not that of the layers.
    """
    modules = dict(block.named_modules())
    groups: list[GroupPlan] = []
    skipped: list[Skip] = []
    claimed: dict[str, str] = {}
    for group in declared:
        previous = expand(group.prev, modules)
        observed = () if group.observe is None else (group.observe,)
        declared_paths = (*group.layers, *group.compensate, *group.no_clip, *observed)
        missing = [path for path in declared_paths if not expand(path, modules)]
        if (not previous or missing) and group.optional:
            continue
        if not previous or missing:
            linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
            raise PlanError(
                f"{where}: scale group {group.prev} -> {', '.join(group.layers)}: nothing matches "
                f"{missing[0] if missing else group.prev!r}",
                hint=f"linears of this block: {', '.join(linears[:12])}",
            )
        for prev in previous:
            layers, compensate, observe = (
                _bind(patterns, group.prev, prev, modules) for patterns in (group.layers, group.compensate, observed)
            )
            if not layers or (observed and not observe):
                absent = group.observe if layers else ", ".join(group.layers)
                raise PlanError(f"{where}: scale group {group.prev}: for {prev} nothing matches {absent!r}")
            for name in (*layers, *compensate, *([f"output of {prev}"] if prev else [])):
                if name in claimed:
                    raise PlanError(f"{where}: {name} is in two scale groups: {claimed[name]} and {prev}")
                claimed[name] = prev
            fit = _fit(prev, layers, compensate, modules, group, where)
            if isinstance(fit, str):
                skipped.append(Skip(f"{prev or 'no scales'} -> {', '.join(layers)}", fit, layers))
                continue
            observe = (*observe, *layers)
            offset, rows, degree = group.norm_offset, group.prev_rows, group.degree
            groups.append(GroupPlan(prev, layers, compensate, observe[0], offset, rows, *fit, degree))
    return tuple(groups), tuple(skipped)


def expand(pattern: str, modules: dict[str, Any]) -> list[str]:
    """Names that match `pattern`, in which `*` stands for one path segment."""
    if "*" not in pattern:
        return [pattern] if pattern in modules else []
    regex = re.compile(fnmatch.translate(pattern).replace(".*", r"[^.]*"))
    return [name for name in modules if regex.fullmatch(name)]


def _bind(patterns: tuple[str, ...], glob: str, prev: str, modules: dict[str, Any]) -> tuple[str, ...]:
    """Expand `patterns`; where `prev` came from a glob, its stars are filled with the same segments."""
    stars = re.fullmatch(re.escape(glob).replace(r"\*", r"([^.]*)"), prev)
    segments = list(stars.groups()) if stars else []
    names: list[str] = []
    for pattern in patterns:
        for segment in segments:
            pattern = pattern.replace("*", segment, 1)
        names += expand(pattern, modules)
    return tuple(names)


def _fit(
    prev: str,
    layers: tuple[str, ...],
    compensate: tuple[str, ...],
    modules: dict[str, nn.Module],
    group: ScaleGroup,
    where: str,
) -> tuple[SharedHeads | None, int] | str:
    """Which channels share a scale (None: each has its own) and the sections of `prev`, or why 1/s cannot be folded
    into it. Raises PlanError where the declaration must be wrong."""
    for name in layers:
        if not isinstance(modules[name], nn.Linear):
            raise PlanError(f"{where}.{name} is not a linear", hint="awq_prepare_model can turn it into one")
    widths: set[int] = {modules[name].in_features for name in layers}  # type: ignore[misc]
    if len(widths) != 1:
        raise PlanError(f"{where}: the readers of {prev} have unequal inputs {sorted(widths)}")
    width = widths.pop()
    for name in compensate:
        shape = tuple(getattr(getattr(modules[name], "weight", None), "shape", ()))
        if shape[-1:] != (width,):
            raise PlanError(f"{where}: {name} is compensated, its weight {shape} does not take {width} inputs")
    if not prev:
        return "no norm or linear before them could be divided"
    module = modules[prev]
    if isinstance(module, nn.Linear):
        return _fit_rows(prev, module.out_features, width, modules[""], group)
    weight = getattr(module, "weight", None)
    if weight is None:
        return f"{prev} has no weight to fold into: the format holds no activation scales"
    if weight.ndim == 1 and group.head_dim and weight.numel() != width:  # a norm of each head, all with one weight
        shared = shared_heads(weight.numel(), width, modules[""], group.head_dim)
        return f"{prev} has {weight.numel()} weights ({shared})" if isinstance(shared, str) else (shared, 1)
    if weight.ndim != 1 or weight.numel() != width:
        raise PlanError(f"{where}: norm {prev} has shape {tuple(weight.shape)}, its readers take {width}")
    return None, 1


def _fit_rows(
    prev: str, rows: int, width: int, block: nn.Module, group: ScaleGroup
) -> tuple[SharedHeads | None, int] | str:
    """`_fit` where `prev` is a linear of `rows` outputs."""
    why = f"{prev} writes {rows} channels, its reader takes {width}"
    if group.prev_rows == "all":
        values = rows
    elif group.head_dim and group.prev_rows != "kv_heads":
        # A fused qkv: the queries are as wide as what the readers take, keys and values alike.
        values = 0 if (rows - width) % 2 else (rows - width) // 2
    else:
        values = width
    if not 0 < values <= min(rows, width):
        return why
    by_head = group.prev_rows in ("heads", "kv_heads")
    if values == width and not by_head:
        return None, 1
    shared = shared_heads(values, width, block, group.head_dim)
    if isinstance(shared, str):
        return f"{why} ({shared})"
    sections = values // shared.head_dim if by_head else 1
    if rows % sections:
        return f"{why} ({sections} heads do not share evenly)"
    return (shared if shared.repeats > 1 else None), sections
