# mypy: allow-untyped-defs
"""RMSNorm with the residual added before it: one program a row, read once and written once.

    h = x + r,   y = h / √(mean(h²) + ε) · (offset + w)

h is rounded to the dtype of x before its square is taken, as the next block will read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from awq_core.kernels.triton.matmul import INTERPRETED, _on
from awq_core.kernels.triton.rounding import rounded

# A row lies in the registers of one program: with 16 warps 64 values a thread.
WIDEST = 32768


@triton.jit
def rms_norm_kernel(
    x_ptr,  # [rows, H], as all but the weight
    residual_ptr,  # or None
    weight_ptr,  # [H]
    normed_ptr,
    total_ptr,  # or None, with the residual
    H,
    eps,
    offset,
    WIDTH: tl.constexpr,  # H, up to a power of two
    OFFSET: tl.constexpr,  # round once, after the weight
    BY_HAND: tl.constexpr,
):
    DTYPE: tl.constexpr = normed_ptr.dtype.element_ty
    column = tl.arange(0, WIDTH)
    inside = column < H
    at = tl.program_id(0).to(tl.int64) * H + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = rounded(x, DTYPE, BY_HAND)
        tl.store(total_ptr + at, total, mask=inside)
        x = total.to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / H + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        weight += offset
    else:
        normed = rounded(normed, DTYPE, BY_HAND).to(tl.float32)
    tl.store(normed_ptr + at, rounded(normed * weight, DTYPE, BY_HAND), mask=inside)


def warps_for(width: int) -> int:
    """16 to 64 values a thread."""
    return min(16, max(1, width // 512))


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`blocks.rms_norm`; the second result is x itself where there is no residual.

    Raises:
        ValueError: rows of more than 32768 values, or shapes that do not belong together.
    """
    width = x.shape[-1]
    if width > WIDEST or weight.shape != (width,) or (residual is not None and residual.shape != x.shape):
        of = f"{tuple(weight.shape)}{'' if residual is None else f' and a residual {tuple(residual.shape)}'}"
        raise ValueError(f"x {tuple(x.shape)} with a weight {of}; rows of {WIDEST} at the most")
    x = x.contiguous()
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    block = triton.next_power_of_2(width)
    if x.numel():
        with _on(x.device):
            rms_norm_kernel[(x.numel() // width,)](
                x,
                None if residual is None else residual.contiguous(),
                weight.contiguous(),
                normed,
                None if residual is None else total,
                width,
                eps,
                offset,
                WIDTH=block,
                OFFSET=offset != 0,
                BY_HAND=INTERPRETED and x.dtype is torch.bfloat16,
                num_warps=warps_for(block),
            )
    return normed, total
