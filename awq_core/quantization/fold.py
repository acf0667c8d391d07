"""Folding a scale: multiply the readers' columns by s, divide what writes their input by s. The function stays.

A norm is stored in a short dtype, so dividing its weight rounds it. The scale that was *really* applied is

    s_eff = (offset + w) / (offset + w_rounded)

and the readers are multiplied by that one, which makes the fold exact in spite of the rounding. A linear that is
quantized afterwards is not rounded in between: its row factor is carried along until its codes are chosen.

Where `prev` writes fewer channels than its readers take (shared_heads.py), s is one scale a channel of `prev`, spread.
So it is where a norm works head by head, and the heads have one weight.
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


def fold_group_norm(
    norm: Any, group: GroupPlan, scale: torch.Tensor, stored: torch.dtype | None = None
) -> torch.Tensor:
    """`fold_norm` for a group, whose heads may share the norm's weight; returns what its readers are multiplied by."""
    effective = fold_norm(norm, tied(group, scale)[0], group.norm_offset, stored)
    return effective if group.shared is None else group.shared.spread(effective)


def fold_rows(
    bias: torch.Tensor | None,
    rows: int,
    scale: torch.Tensor,
    stored: torch.dtype | None = None,
    sections: int = 1,
) -> torch.Tensor:
    """Row divisors, `[rows]`, of a linear whose outputs are in `sections` equal parts, of each of which the last ones
    are divided by the next of `scale`; divides its bias too, rounded to `stored`, its dtype on disk."""
    divisor = torch.ones(rows, device=scale.device)
    values = scale.view(sections, -1)
    divisor.view(sections, -1)[:, rows // sections - values.shape[1] :] = values
    if bias is not None:
        bias.data.copy_((bias.data.float() / divisor).to(stored or bias.dtype))
    return divisor


def tied(group: GroupPlan, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what `prev` is divided by, what its readers are multiplied by, `[in]`), for s `[in]`."""
    own = scale
    if group.shared is not None:
        own = group.shared.first(scale)
        scale = group.shared.spread(own)
    return own ** (1 / group.degree), scale


def apply_to_block(block: nn.Module, group: GroupPlan, scale: torch.Tensor, *, fold_previous: bool = True) -> None:
    """Fold `scale` into a block's own weights in place, in their dtype. Used where nothing is quantized: the proof.

    Args:
        fold_previous: False leaves out the division, which must change the function: the proof's negative control.
    """
    own, spread = tied(group, scale)
    if fold_previous:
        previous = block.get_submodule(group.prev)
        if isinstance(previous, nn.Linear):
            divisor = fold_rows(previous.bias, previous.out_features, own, sections=group.sections)
            previous.weight.data.div_(divisor[:, None])
        else:
            spread = fold_group_norm(previous, group, scale)
    for name in (*group.layers, *group.compensate):
        block.get_parameter(f"{name}.weight").data.mul_(spread)
