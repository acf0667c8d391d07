"""Dynamic Heuristic AWQ: flip a few codes of each output so that its mean error cancels.

Rounding to nearest leaves output n with the mean error

    e_n = Σ_i E[x_i] (w_ni − ŵ_ni)

Moving code i to the other neighbour of the real value (a *flip*) changes e_n by −v_ni, v_ni = E[x_i] d_ni Δ_ni, where
d_ni = sign(r_ni) and r_ni = w_ni/Δ_ni + z_ni − q_ni is the rounding residue. Flips that push e_n towards zero are
sorted by |r_ni|, closest to the rounding boundary first and over the whole row, across groups; the prefix that leaves
the smallest |e_n| is applied, among prefixes of at most `max_flip_percent` of the row.

Outlier channels are left alone: of |E[x]| sorted downwards the first half is kept, both axes are normalised to [0, 1],
and the knee is where the curve is farthest from the chord between its ends (Kneedle, Satopää et al. 2011), moved on by
`knee_tolerance` of the half. Channels above the knee's value never flip.

The procedure is that of the repository anhnda/FPRAG (2025-12, research code; there is no paper), with three
differences: fp32 throughout, where it sums in bf16; the best prefix is chosen within the cap, where it cuts the best
prefix off at the cap; and weights come scaled by one s a scale *group*, where it has one a linear, so that s folds into
the operation before and the result is an AWQ checkpoint. Its scales are powers of the salience E[x²], the diagonal of
the Gram matrix: with this rounding the scale search tries these too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization.rounded import Rounded
from awq_core.quantization.rounding import Grid, decode, grouped, nearest, other_neighbour

MAX_FLIP_PERCENT = 0.01
KNEE_TOLERANCE = 0.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the heuristic needs of the input.

    Attributes:
        mean: E[x] of the scaled input, `[in]`.
        free: channels whose codes may flip, `[in]` bool.
        cap: most flips a row.
    """

    mean: torch.Tensor
    free: torch.Tensor
    cap: int


def prepare(
    statistics: Statistics, *, max_flip_percent: float = MAX_FLIP_PERCENT, knee_tolerance: float = KNEE_TOLERANCE
) -> Prepared:
    """Find the outlier channels.

    Args:
        statistics: of the scaled input.
        max_flip_percent: most flips a row, as a fraction of in_features.
        knee_tolerance: fraction of the sorted half by which the knee moves on; more protects more channels.
    """
    size = statistics.mean.abs()
    free = size <= knee(size, knee_tolerance)
    return Prepared(statistics.mean, free, int(max_flip_percent * size.numel()))


def knee(values: torch.Tensor, tolerance: float = 0.0) -> torch.Tensor:
    """The value (0-d) at the knee of non-negative `values` `[n]` sorted downwards."""
    curve = values.sort(descending=True).values[: max(1, values.numel() // 2)]
    height = (curve - curve[-1]) / (curve[0] - curve[-1]).clamp(min=torch.finfo(curve.dtype).tiny)
    chord = torch.linspace(1, 0, curve.numel(), device=curve.device) * height[0]
    index = int((height - chord).abs().argmax()) + int(tolerance * curve.numel())
    return curve[max(0, min(index, curve.numel() - 1))]


def round_rows(weight: torch.Tensor, grid: Grid, step_dtype: torch.dtype, prepared: Prepared) -> Rounded:
    """Nearest codes, then flips.

    Args:
        weight: fp32 `[out, in]`, scaled.
        grid: of these rows, `[out, groups]`.
        step_dtype: unused, the grid stays.
        prepared: see `prepare`.
    """
    groups = grouped(weight, weight.shape[1] // grid.step.shape[1])
    codes = nearest(groups, grid)
    masked = float((~prepared.free).float().mean())
    error = (weight - decode(codes, grid).flatten(-2)) @ prepared.mean
    residue, direction, possible = other_neighbour(groups, codes, grid)
    change = (direction * grid.step[..., None]).flatten(-2) * prepared.mean
    helps = possible.flatten(-2) & prepared.free & (change * error[:, None] > 0)

    order = residue.abs().flatten(-2).masked_fill_(~helps, -1).topk(prepared.cap, dim=1)
    flippable = order.values >= 0
    after = error[:, None] - (change.gather(1, order.indices) * flippable).cumsum(1)
    length = torch.cat([error[:, None], after], 1).abs_().argmin(1)
    taken = flippable & (torch.arange(prepared.cap, device=weight.device) < length[:, None])
    moves = direction.flatten(-2).gather(1, order.indices) * taken
    codes.flatten(-2).scatter_add_(1, order.indices, moves)
    return Rounded(codes, grid, int(taken.sum()), masked, "heuristic")
