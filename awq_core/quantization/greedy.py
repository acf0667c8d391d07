"""Greedy flips: spend a small budget of flips where they lower the output error most.

A *flip* moves a code from the nearest level to the other neighbour of the real value. For a row with error
δ = ŵ − w, moving code i by d = ±1 changes its loss δ H δᵀ by

    2 d Δ_i (δH)_i  +  Δ_i² H_ii

The heuristic (`heuristic.py`) sees only the mean, H = E[x] E[x]ᵀ; here is the full second moment. Each round flips the
best code of every row and brings δH up to date with the row of H that belongs to it, (δH) += d Δ_i H_i, so every
choice is exact. A row stops when no flip lowers its loss, or after `budget` of its codes. This is the greedy form of
coordinate descent (CDQuant, arXiv 2406.17542) with the step held to one neighbour.

Why only the other neighbour, once: the error of a weight stays below one step, whatever the calibration tokens say,
and a flip always moves its own weight away from the real value. So the ridge of `rounded.py` can only veto flips, and
the loss falls without it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from awq_core.calibration.statistics import Statistics
from awq_core.gemm import times_symmetric
from awq_core.quantization.rounded import Rounded, shrinkage_ridge
from awq_core.quantization.rounding import Grid, decode, grouped, nearest, other_neighbour

BUDGET = 0.1
# Weights worked at once on a CPU: the five arrays of a round stay in cache from round to round.
CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True, slots=True)
class Prepared:
    """What greedy flips need of the input.

    Attributes:
        gram: H of the scaled input, `[in, in]`.
        ridge: added to its diagonal, `[in]`.
        cap: most flips a row.
    """

    gram: torch.Tensor
    ridge: torch.Tensor
    cap: int


def prepare(statistics: Statistics, *, budget: float = BUDGET, shrinkage: float | None = None) -> Prepared:
    """Collect what `round_rows` needs.

    Args:
        statistics: of the scaled input.
        budget: most flips a row, as a fraction of in_features.
        shrinkage: ρ of `rounded.py`; None chooses it by the number of tokens.
    """
    gram = statistics.gram
    return Prepared(gram, shrinkage_ridge(statistics, shrinkage), int(budget * gram.shape[0]))


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
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1]) if weight.device.type == "cpu" else weight.shape[0]
    flips = 0
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        flips += _flip(groups[part], codes[part], Grid(grid.step[part], grid.zero[part]), prepared)
    return Rounded(codes, grid, flips, 0.0, "greedy")


def _flip(groups: torch.Tensor, codes: torch.Tensor, grid: Grid, prepared: Prepared) -> int:
    """Flip `codes` in place; returns how many. All `[rows, groups, group_size]`."""
    _, direction, possible = other_neighbour(groups, codes, grid)
    move = (direction * grid.step[..., None]).flatten(-2)
    error = (decode(codes, grid) - groups).flatten(-2)
    slope = times_symmetric(error, prepared.gram).addcmul_(error, prepared.ridge)
    # The part of a flip's gain that stays; inf closes a weight: out of range, or flipped already.
    fixed = (move.square() * (prepared.gram.diagonal() + prepared.ridge)).masked_fill_(~possible.flatten(-2), torch.inf)
    twice = move * 2
    flat, direction, gain = codes.view(codes.shape[0], -1), direction.flatten(-2), torch.empty_like(move)
    flips = 0
    for _ in range(prepared.cap):
        index = _smallest(torch.addcmul(fixed, twice, slope, out=gain))
        active = gain.gather(1, index) < 0
        count = int(active.sum())
        if count == 0:
            break
        flips += count
        # The ridge part of the slope is not updated: it acts on the flipped weight alone, and that one is closed.
        slope.addcmul_(move.gather(1, index) * active, prepared.gram.index_select(0, index[:, 0]))
        fixed.scatter_(1, index, torch.inf)
        flat.scatter_add_(1, index, direction.gather(1, index) * active)
    return flips


def _smallest(values: torch.Tensor) -> torch.Tensor:
    """Index of the smallest in each row, `[rows, 1]`. Part by part: a minimum without its index is much faster."""
    parts = values.unflatten(1, (-1, math.gcd(values.shape[1], 128)))
    part = parts.amin(-1).argmin(1, keepdim=True)
    inside = parts.take_along_dim(part[..., None], 1).argmin(-1)
    return part * parts.shape[-1] + inside
