"""Folding a scale: multiply the readers' columns by s, divide what writes their input by s. The function stays.

A norm is stored in a short dtype, so dividing its weight rounds it. The scale that was *really* applied is

    s_eff = (offset + w) / (offset + w_rounded)

and the readers are multiplied by that one, which makes the fold exact in spite of the rounding. A linear that is
quantized afterwards is not rounded in between: its row factor is carried along until its codes are chosen.

Where `prev` writes fewer channels than its readers take (shared_heads.py), s is one scale a channel of `prev`, spread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from awq_core.scale_groups import GroupPlan


def fold_norm(norm: Any, scale: torch.Tensor, offset: float, stored: torch.dtype | None = None) -> torch.Tensor:
    """Divide a norm's output by `scale` (`[in]`) in place; returns the effective scale, fp32 `[in]`.

    Args:
        stored: dtype the norm has on disk, where that is shorter than the one it is worked in.
    """
    weight = norm.weight.data
    stored = stored or weight.dtype
    old = weight.float() + offset
    weight.copy_((old / scale - offset).to(stored))
    new = weight.float() + offset
    usable = (old != 0) & (new != 0)
    effective = torch.where(usable, old / torch.where(usable, new, torch.ones_like(new)), scale)
    bias = getattr(norm, "bias", None)
    if bias is not None:
        bias.data.copy_((bias.data.float() / effective).to(stored))
    return effective


def fold_rows(
    bias: torch.Tensor | None, rows: int, scale: torch.Tensor, stored: torch.dtype | None = None
) -> torch.Tensor:
    """Row divisors of a linear whose last len(scale) of `rows` outputs are divided by `scale`; divides its bias too,
    rounded to `stored`, its dtype on disk."""
    divisor = torch.ones(rows, device=scale.device)
    divisor[rows - scale.numel() :] = scale
    if bias is not None:
        bias.data.copy_((bias.data.float() / divisor).to(stored or bias.dtype))
    return divisor


def tied(group: GroupPlan, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what `prev` is divided by, what its readers are multiplied by, `[in]`), for s `[in]`."""
    if group.shared is None:
        return scale, scale
    own = group.shared.first(scale)
    return own, group.shared.spread(own)


def apply_to_block(block: nn.Module, group: GroupPlan, scale: torch.Tensor, *, fold_previous: bool = True) -> None:
    """Fold `scale` into a block's own weights in place, in their dtype. Used where nothing is quantized: the proof.

    Args:
        fold_previous: False leaves out the division, which must change the function: the proof's negative control.
    """
    own, scale = tied(group, scale)
    if fold_previous:
        previous = block.get_submodule(group.prev)
        if isinstance(previous, nn.Linear):
            divisor = fold_rows(previous.bias, previous.out_features, own)
            previous.weight.data.div_(divisor[:, None])
        else:
            scale = fold_norm(previous, scale, group.norm_offset)
    for name in (*group.layers, *group.compensate):
        block.get_parameter(f"{name}.weight").data.mul_(scale)
