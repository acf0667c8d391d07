"""Coordinate descent on codes and steps: polish a rounding until single changes stop helping.

With δ = ŵ − w and everything else fixed, the loss δ H δᵀ is a parabola in one code, and its best integer is

    q_i  ←  clamp(round(q_i − (δH)_i / (H_ii Δ_i)), 0, 15)

and a parabola in one group's step, at fixed codes u = q − z:

    Δ  ←  Δ − u·(δH)_g / (u H_gg uᵀ)          rounded to the dtype it is stored in, kept only where the loss is lower

so the loss never rises. A sweep visits every column in order, all rows at once (QuantEase, arXiv 2309.01885; COMQ,
arXiv 2403.07134, for the steps). δH is kept up to date by one matrix product a block of columns; inside a block a
column adds the changes made so far. Arrays are `[in, out]` here, so that a column of the weight is contiguous.
"""

from __future__ import annotations

import torch

from awq_core.gemm import times_symmetric
from awq_core.quantization.rounding import LEVELS, SMALLEST_STEP, Grid, decode, grouped

BLOCK = 128


def descend(
    weight: torch.Tensor,
    codes: torch.Tensor,
    grid: Grid,
    gram: torch.Tensor,
    ridge: torch.Tensor,
    step_dtype: torch.dtype,
    *,
    sweeps: int,
    refit: bool,
) -> tuple[torch.Tensor, Grid]:
    """Better codes, and better steps with `refit`.

    Args:
        weight: fp32 `[out, in]`.
        codes: to start from, `[out, groups, group_size]`.
        grid: `[out, groups]`.
        gram, ridge: the loss is δ (H + diag(ridge)) δᵀ; `[in, in]` and `[in]`, with H_ii + ridge_i > 0 everywhere.
        step_dtype: dtype scales are stored in.
        sweeps: passes over the columns; with `refit` each is preceded by a refit of all steps.
    """
    size = codes.shape[-1]
    error = decode(codes, grid).flatten(-2).sub_(weight)
    slope = times_symmetric(error, gram).addcmul_(error, ridge).T.contiguous()
    del error
    codes, step = _columns_first(codes.flatten(-2)), _columns_first(grid.step)
    for _ in range(sweeps):
        if refit:
            _refit_steps(codes, step, grid.zero.T, slope, gram, ridge, step_dtype)
        _sweep_codes(codes, step, slope, gram, ridge)
    return grouped(codes.T.contiguous(), size), Grid(step.T.contiguous(), grid.zero)


def _columns_first(rows: torch.Tensor) -> torch.Tensor:
    """A transposed copy; `.T.contiguous()` is none where there is one row or one column."""
    return rows.T.clone(memory_format=torch.contiguous_format)


def _sweep_codes(
    codes: torch.Tensor, step: torch.Tensor, slope: torch.Tensor, gram: torch.Tensor, ridge: torch.Tensor
) -> None:
    """Move every code to its best value once; `codes` and `slope` (δH), both `[in, out]`, change in place."""
    size = codes.shape[0] // step.shape[0]
    diagonal = gram.diagonal() + ridge
    for start in range(0, codes.shape[0], BLOCK):
        columns = slice(start, min(start + BLOCK, codes.shape[0]))
        block, change = gram[columns, columns], torch.empty_like(codes[columns])
        for i in range(block.shape[0]):
            k = start + i
            width = step[k // size]
            now = slope[k] + block[i, :i] @ change[:i]
            better = (codes[k] - now / (diagonal[k] * width)).round_().clamp_(0, LEVELS)
            torch.mul(better - codes[k], width, out=change[i])
            codes[k] = better
        _apply(change, columns, slope, gram, ridge)


def _refit_steps(
    codes: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    slope: torch.Tensor,
    gram: torch.Tensor,
    ridge: torch.Tensor,
    step_dtype: torch.dtype,
) -> None:
    """Refit each group's step, `[groups, out]`, to its codes; `step` and `slope` change in place."""
    size = codes.shape[0] // step.shape[0]
    for g in range(step.shape[0]):
        columns = slice(g * size, (g + 1) * size)
        unit = codes[columns] - zero[g]
        curvature = (gram[columns, columns] @ unit).addcmul_(unit, ridge[columns, None]).mul_(unit).sum(0)
        pull = (unit * slope[columns]).sum(0)
        fitted = (step[g] - pull / curvature).clamp(min=SMALLEST_STEP).to(step_dtype).float()
        moved = fitted - step[g]
        # False as well where the fit is NaN or inf: a group of zeros, a step that overflows its dtype.
        fitted = torch.where(moved * (2 * pull + moved * curvature) < 0, fitted, step[g])
        _apply(unit.mul_(fitted - step[g]), columns, slope, gram, ridge)
        step[g] = fitted


def _apply(change: torch.Tensor, columns: slice, slope: torch.Tensor, gram: torch.Tensor, ridge: torch.Tensor) -> None:
    """δH after `change` (`[columns, out]`) of these weights."""
    slope.addmm_(gram[:, columns], change)
    slope[columns].addcmul_(change, ridge[columns, None])
