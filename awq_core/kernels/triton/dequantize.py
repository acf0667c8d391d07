# mypy: allow-untyped-defs
"""The weight in 16 bits, for prefill: with hundreds of tokens the product is bound by arithmetic, where nothing beats
the vendor's own matrix product, and unpacking costs one pass over the weight.

Each program turns one tile of 64 rows by 128 inputs (`layout.py`) into W[n, k] = (q − z) · Δ, worked out in fp32 and
rounded once: the very numbers of `checkpoint.pack.dequantize`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from awq_core.kernels.triton.layout import TiledWeight
from awq_core.kernels.triton.matmul import INTERPRETED, _on


@triton.jit
def dequantize_kernel(
    tiles_ptr,
    scales_ptr,
    zeros_ptr,
    weight_ptr,  # [N, K]
    N,
    K,
    GROUP: tl.constexpr,  # 32, 64, 128, or 0 for a whole row
):
    block = tl.program_id(0)
    row = tl.arange(0, 64)
    n = tl.program_id(1) * 64 + row
    r = tl.arange(0, 32)
    at = (tl.program_id(1) * tl.num_programs(0) + block) * 2048 + row[:, None] * 32 + r[None, :]
    words = tl.load(tiles_ptr + at, eviction_policy="evict_first")
    for plane in tl.static_range(4):
        k = block * 128 + plane * 32
        group = k // GROUP if GROUP else 0
        scale = tl.load(scales_ptr + group * N + n, mask=n < N, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group * N + n, mask=n < N, other=0).to(tl.float32)
        code = ((words >> (4 * plane)) & 0xF).to(tl.float32)
        value = (code - zero[:, None]) * scale[:, None]
        inside = (n[:, None] < N) & (k + r[None, :] < K)
        # 64-bit: a weight of 16 bits may hold more than 2³¹ values
        to = weight_ptr + n[:, None].to(tl.int64) * K + (k + r)[None, :]
        tl.store(to, value.to(weight_ptr.dtype.element_ty), mask=inside)


def dequantize(weight: TiledWeight, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """W [N, inputs] in `dtype`, equal to `checkpoint.pack.dequantize` bit for bit."""
    blocks = weight.tiles.shape[1]
    # Triton's interpreter rounds to bf16 wrongly: it writes fp32, and torch rounds.
    stored = torch.float32 if INTERPRETED and dtype is torch.bfloat16 else dtype
    out = torch.empty(weight.out_features, inputs, dtype=stored, device=weight.tiles.device)
    grid = (blocks, weight.tiles.shape[0])
    with _on(out.device):
        dequantize_kernel[grid](
            weight.tiles,
            weight.scales,
            weight.zeros,
            out,
            weight.out_features,
            inputs,
            GROUP=weight.group,
            num_warps=4,
        )
    return out.to(dtype)
