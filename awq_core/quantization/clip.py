"""Group-wise clipping: narrowing a range gives the weights inside it a finer grid, at the cost of its extremes.

For every output row and group the two ends are shrunk independently, (f_lo, f_hi) over {1, 0.95, ... 0.7}² with
|f_lo − f_hi| <= 0.2, and scored by the group's own block of the Gram matrix:

    loss = δ H_gg δᵀ,       δ = Q(w_g; f_lo·lo, f_hi·hi) − w_g

which is AWQ's clip objective over all tokens instead of a sample of them. The range still includes zero. Query and
key are left alone by declared role: their errors meet in a product that this loss does not see.
"""

from __future__ import annotations

import torch

from awq_core.gemm import screening_dtype
from awq_core.quantization.rounding import LEVELS, full_range, grouped, make_grid

FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
PAIRS = tuple((lo, hi) for lo in FACTORS for hi in FACTORS if abs(lo - hi) <= 0.2 + 1e-9)
# Rows worked at once: a few MB of weights stay in cache through all pairs.
CHUNK_ELEMENTS = 1 << 19


def search(
    weight: torch.Tensor, gram: torch.Tensor, group_size: int, step_dtype: torch.dtype, *, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best range of every group.

    Args:
        weight: fp32 `[out, in]`, already scaled.
        gram: `[in, in]`, of the scaled input; only its diagonal blocks are read.
        group_size: of the quantizer.
        step_dtype: dtype scales are stored in.
        symmetric: shrink both ends by one factor.

    Returns:
        (lo, hi), each `[out, groups]`, with lo <= 0 <= hi.
    """
    blocks = _diagonal_blocks(gram, group_size).to(screening_dtype(gram.device))
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts = [_search_rows(grouped(part, group_size), blocks, step_dtype, symmetric) for part in weight.split(rows)]
    return torch.cat([lo for lo, _ in parts]), torch.cat([hi for _, hi in parts])


def _diagonal_blocks(gram: torch.Tensor, group_size: int) -> torch.Tensor:
    """H_gg of every group, `[groups, group_size, group_size]`."""
    count = gram.shape[0] // group_size
    return (
        gram.unflatten(0, (count, group_size))
        .unflatten(2, (count, group_size))
        .diagonal(dim1=0, dim2=2)
        .permute(2, 0, 1)
    )


def _search_rows(
    groups: torch.Tensor, blocks: torch.Tensor, step_dtype: torch.dtype, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = groups.transpose(0, 1).contiguous()  # [groups, rows, group_size], for batched products with H_gg
    lo, hi = full_range(groups)
    best = torch.full_like(lo, torch.inf)
    best_lo, best_hi = lo, hi
    for f_lo, f_hi in PAIRS:
        if symmetric and f_lo != f_hi:
            continue
        loss = _loss(groups, lo * f_lo, hi * f_hi, blocks, step_dtype)
        better = loss < best
        best = torch.where(better, loss, best)
        best_lo = torch.where(better, lo * f_lo, best_lo)
        best_hi = torch.where(better, hi * f_hi, best_hi)
    return best_lo.T, best_hi.T


def _loss(
    groups: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, blocks: torch.Tensor, step_dtype: torch.dtype
) -> torch.Tensor:
    """δ H_gg δᵀ of every group, `[groups, rows]`; worked in units of the step, which saves passes over the weights."""
    grid = make_grid(lo, hi, step_dtype)
    exact = groups / grid.step[..., None]
    error = exact.round().clamp_(min=-grid.zero[..., None], max=LEVELS - grid.zero[..., None]).sub_(exact)
    error = error.to(blocks.dtype)
    return torch.linalg.vecdot(torch.bmm(error, blocks), error).float() * grid.step.square()
