"""Group quantization: a range becomes a grid of 16 levels, and weights become codes on it.

    Δ = (hi - lo) / 15        z = round(-lo / Δ)        q = clamp(round(w / Δ) + z, 0, 15)        ŵ = (q - z) · Δ

The range always includes zero (lo <= 0 <= hi), so the zero point is a code of the grid and a group of one sign does
not saturate. Δ is rounded to the dtype it is stored in *before* the codes are chosen: codes fit the grid on disk.
Weights are handled as `[out, groups, group_size]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = 15
# The smallest step that both storage dtypes hold with a few bits of precision.
SMALLEST_STEP = 2.0**-20


@dataclass(frozen=True, slots=True)
class Grid:
    """Step and zero point of every group, `[out, groups]`; `step` is fp32 but exactly representable on disk."""

    step: torch.Tensor
    zero: torch.Tensor


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """View `[out, in]` as `[out, groups, group_size]`."""
    return weight.unflatten(-1, (-1, group_size))


def full_range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, hi), each `[out, groups]`: minimum and maximum, widened to include zero."""
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)


def make_grid(lo: torch.Tensor, hi: torch.Tensor, step_dtype: torch.dtype) -> Grid:
    """The grid of a range; `step_dtype` is the dtype scales are stored in."""
    step = ((hi - lo) / LEVELS).clamp(min=SMALLEST_STEP).to(step_dtype).float()
    return Grid(step, (-lo / step).round_().clamp_(0, LEVELS))


def nearest(groups: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes 0..15 as floats, `[out, groups, group_size]`: the nearest level of each weight."""
    return (groups / grid.step[..., None]).round_().add_(grid.zero[..., None]).clamp_(0, LEVELS)


def other_neighbour(groups: torch.Tensor, codes: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, ...]:
    """(residue w/Δ + z − q, the step of ±1 towards it, whether that stays within 0..15), each of the shape of `codes`:
    what a flip of a nearest code would do."""
    residue = groups / grid.step[..., None] + grid.zero[..., None] - codes
    direction = torch.where(residue < 0, -1.0, 1.0)
    return residue, direction, (codes + direction >= 0) & (codes + direction <= LEVELS)


def decode(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weights from codes, `[out, groups, group_size]` fp32."""
    return (codes - grid.zero[..., None]).mul_(grid.step[..., None])


def round_trip(weight: torch.Tensor, group_size: int, step_dtype: torch.dtype) -> torch.Tensor:
    """Round-to-nearest of `[out, in]` on its full range: the fake-quantized weight."""
    groups = grouped(weight, group_size)
    grid = make_grid(*full_range(groups), step_dtype)
    return decode(nearest(groups, grid), grid).flatten(-2)
