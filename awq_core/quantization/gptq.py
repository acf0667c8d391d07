"""GPTQ: round the columns one after another, each making up for the errors of those before it.

With H = R Rᵀ, R upper triangular, the loss of a row's error δ = ŵ − w is a sum of squares in which term k knows only
the columns up to k:

    δ H δᵀ  =  Σ_k R_kk² (δ_k + Σ_{j<k} δ_j U_jk)²,        U_jk = R_jk / R_kk

so columns are rounded in order, ŵ_k = Q(w_k − Σ_{j<k} δ_j U_jk), which makes each term as small as the grid allows.
That is GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304, which shows them equal): one Cholesky
factorization and no inverse, errors are fed back a block of columns at a time. Columns go in order of falling H_ii
("act-order"), on the scaled, clipped grid that was found before ("static groups"): a column keeps the group it was
stored in, so the checkpoint needs no g_idx, which AWQ has no place for.

Afterwards coordinate descent (`descent.py`) polishes codes and steps, and a row that nearest rounding served better
gets its nearest codes back. Feedback believes every entry of H, so it overfits when tokens are few: the off-diagonal
is shrunk accordingly (`rounded.py`), and below `min_tokens_per_feature` tokens per input channel greedy flips are used
instead, with a note.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from awq_core.calibration.statistics import Statistics
from awq_core.errors import NumericsError
from awq_core.gemm import times_symmetric
from awq_core.quantization import greedy
from awq_core.quantization.descent import descend
from awq_core.quantization.rounded import Rounded, shrinkage_ridge
from awq_core.quantization.rounding import LEVELS, Grid, decode, grouped, nearest

SWEEPS = 2
MIN_TOKENS_PER_FEATURE = 4.0
# Of the mean of diag(H): keeps H + diag(ridge) positive definite whatever its rank.
DAMPENING = 1e-4
RESCUE = 0.01
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Prepared:
    """What GPTQ needs of the input.

    Attributes:
        gram: H of the scaled input, `[in, in]`.
        ridge: added to its diagonal, `[in]`.
        order: columns in the order they are rounded, `[in]`.
        feedback: U, unit upper triangular, `[in, in]`, columns in that order.
        sweeps, refit: of the coordinate descent.
    """

    gram: torch.Tensor
    ridge: torch.Tensor
    order: torch.Tensor
    feedback: torch.Tensor
    sweeps: int
    refit: bool


@dataclass(frozen=True, slots=True)
class TooFewTokens:
    """Stands in for `Prepared` where feedback would overfit: greedy flips, and the reason in words."""

    greedy: greedy.Prepared
    note: str


def prepare(
    statistics: Statistics,
    *,
    shrinkage: float | None = None,
    sweeps: int = SWEEPS,
    refit: bool = True,
    act_order: bool = True,
    min_tokens_per_feature: float = MIN_TOKENS_PER_FEATURE,
) -> Prepared | TooFewTokens:
    """Factorize H, or decide that there are too few tokens to.

    Args:
        statistics: of the scaled input.
        shrinkage: ρ of `rounded.py`; None chooses it by the number of tokens.
        sweeps: of coordinate descent afterwards; 0 leaves it out.
        refit: let the descent refit the steps.
        act_order: round the columns with the largest H_ii first, instead of from left to right.
        min_tokens_per_feature: below this many tokens per input channel, greedy flips are used instead.

    Raises:
        NumericsError: H has no Cholesky factor: it holds NaN or inf.
    """
    gram = statistics.gram
    columns = gram.shape[0]
    tokens = statistics.n_effective
    if tokens < min_tokens_per_feature * columns:
        note = f"gptq needs {min_tokens_per_feature:g} tokens an input channel and they saw fewer"
        return TooFewTokens(greedy.prepare(statistics, shrinkage=shrinkage), note)
    diagonal = gram.diagonal()
    ridge = shrinkage_ridge(statistics, shrinkage) + DAMPENING * diagonal.mean()
    # All channels dead: any positive ridge makes every weight round to nearest.
    ridge = torch.where(diagonal + ridge > 0, ridge, 1.0)
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(columns, device=gram.device)
    return Prepared(gram, ridge, order, _feedback(gram, ridge, order), sweeps, refit)


def _feedback(gram: torch.Tensor, ridge: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """U of H + diag(ridge) in `order`. A Cholesky factor is lower triangular: that of the reversed matrix, reversed."""
    backwards = order.flip(0)
    matrix = gram[backwards[:, None], backwards]
    matrix.diagonal().add_(ridge[backwards])
    upper = _cholesky(matrix).flip(0, 1)
    del matrix
    return upper.div_(upper.diagonal().clone()).float()


def _cholesky(matrix: torch.Tensor) -> torch.Tensor:
    """The lower factor, in fp64 where fp32 does not get through, and with a larger diagonal where that does not."""
    for dtype, more in ((torch.float32, 0.0), (torch.float64, 0.0), (torch.float64, RESCUE)):
        attempt = matrix.to(dtype)
        attempt.diagonal().mul_(1 + more)
        factor, failed = torch.linalg.cholesky_ex(attempt)
        if not failed and torch.isfinite(factor.diagonal()).all():
            return factor
    raise NumericsError("the Gram matrix of a linear's input has no Cholesky factor", hint="does it hold NaN or inf?")


def round_rows(weight: torch.Tensor, grid: Grid, step_dtype: torch.dtype, prepared: Prepared | TooFewTokens) -> Rounded:
    """Error feedback, then coordinate descent; no row ends worse than rounded to nearest.

    Args:
        weight: fp32 `[out, in]`, scaled.
        grid: of these rows, `[out, groups]`.
        step_dtype: dtype scales are stored in; refitted steps are rounded to it.
        prepared: see `prepare`.
    """
    if isinstance(prepared, TooFewTokens):
        return replace(greedy.round_rows(weight, grid, step_dtype, prepared.greedy), note=prepared.note)
    codes = _with_feedback(weight, grid, prepared.order, prepared.feedback)
    fitted = grid
    if prepared.sweeps:
        codes, fitted = descend(
            *(weight, codes, grid, prepared.gram, prepared.ridge, step_dtype),
            sweeps=prepared.sweeps,
            refit=prepared.refit,
        )
    plain = nearest(grouped(weight, codes.shape[-1]), grid)
    worse = _loss_above(weight, (codes, fitted), (plain, grid), prepared.gram) > 0
    codes[worse] = plain[worse]
    step = torch.where(worse[:, None], grid.step, fitted.step)
    return Rounded(codes, Grid(step, grid.zero), int((codes != plain).sum()), 0.0, "gptq")


def _with_feedback(weight: torch.Tensor, grid: Grid, order: torch.Tensor, feedback: torch.Tensor) -> torch.Tensor:
    """Codes `[out, groups, group_size]`, rounded column by column."""
    size = weight.shape[1] // grid.step.shape[1]
    step, zero = grid.step.T.contiguous(), grid.zero.T.contiguous()
    group = (order // size).tolist()
    work = weight.T[order]  # [in, out]: a row holds a column's weights until they are rounded, then their codes
    error = torch.empty_like(work)
    for start in range(0, len(group), BLOCK):
        columns = slice(start, min(start + BLOCK, len(group)))
        block = feedback[columns, columns].T.contiguous()
        before = feedback[:start, columns].T @ error[:start]
        for i in range(block.shape[0]):
            k = start + i
            width, origin = step[group[k]], zero[group[k]]
            target = work[k] - before[i] - block[i, :i] @ error[start:k]
            code = (target / width).round_().add_(origin).clamp_(0, LEVELS)
            torch.sub((code - origin) * width, work[k], out=error[k])
            work[k] = code
    codes = error  # the errors are used up
    codes[order] = work
    return grouped(codes.T.contiguous(), size)


def _loss_above(
    weight: torch.Tensor,
    a: tuple[torch.Tensor, Grid],
    b: tuple[torch.Tensor, Grid],
    gram: torch.Tensor,
) -> torch.Tensor:
    """By how much the loss of each row is larger with codes and grid `a` than with `b`, `[out]`: one product for two
    losses, a H aᵀ − b H bᵀ = (a − b) H (a + b)ᵀ."""
    error_a, error_b = (decode(*one).flatten(-2).sub_(weight) for one in (a, b))
    difference = error_a - error_b
    return torch.linalg.vecdot(times_symmetric(difference, gram), error_a.add_(error_b))
