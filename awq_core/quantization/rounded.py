"""What the rounding methods have in common: what they are given, what they return, how they lean on the Gram matrix.

A method (`heuristic`, `greedy`, `gptq`) is a module with two functions:

    prepare(statistics, **options) -> Prepared                      once a linear: whatever does not depend on weights
    round_rows(weight, grid, step_dtype, prepared) -> Rounded       any slice of output rows

Outputs are independent of one another once the grid is fixed, tr(δ H δᵀ) = Σ_n δ_n H δ_nᵀ, so a large linear is worked
slice by slice (`codes.py`).

Off its diagonal the Gram matrix of few tokens is mostly noise, and codes chosen to fit that noise do harm on other
tokens. So it is averaged with that of as many imaginary tokens as there are channels, in which the channels are
independent: the off-diagonal shrinks by ρ = in / (in + n), n the number of tokens (the effective one, where they count
unequally). Up to a factor that changes no decision this is a *ridge* on the diagonal, and a vector does what would need
a second matrix:

    (1 − ρ) H + ρ diag(H)  =  (1 − ρ) · (H + diag(r)),      r = ρ / (1 − ρ) · diag(H)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization.rounding import Grid


@dataclass(frozen=True, slots=True)
class Rounded:
    """Codes of some rows of a linear.

    Attributes:
        codes: 0..15 as floats, `[out, groups, group_size]`.
        grid: step and zero point, `[out, groups]`; the step may have been refitted.
        flips: codes that are not the nearest of the grid that was given.
        masked: share of the input channels whose codes were not allowed to move.
        method: the method that was really used.
        note: why that is not the one that was asked for; empty when it is.
    """

    codes: torch.Tensor
    grid: Grid
    flips: int
    masked: float
    method: str
    note: str = ""


def shrinkage_ridge(statistics: Statistics, shrinkage: float | None = None) -> torch.Tensor:
    """r of the formula above, `[in]`, for ρ = `shrinkage` in [0, 1); None chooses ρ by the number of tokens."""
    diagonal = statistics.gram.diagonal()
    if shrinkage is None:
        shrinkage = diagonal.numel() / (diagonal.numel() + max(statistics.n_effective, 1))
    if not 0 <= shrinkage < 1:
        raise ValueError(f"shrinkage {shrinkage} is outside [0, 1)")
    return diagonal * (shrinkage / (1 - shrinkage))
