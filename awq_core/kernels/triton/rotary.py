# mypy: allow-untyped-defs
"""Rotary embedding of queries and keys, and keys and values into the cache: one launch instead of a dozen.

The two halves of a head's first R numbers are pairs, each turned by an angle of its position:

    y[i] = x[i] · cos[i] − x[i + R/2] · sin[i]          i < R/2
    y[i] = x[i] · cos[i] + x[i − R/2] · sin[i]          R/2 ≤ i < R
    y[i] = x[i]                                         R ≤ i

A program takes one token and a few heads, of queries or of keys. Worked out in fp32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from awq_core.kernels.triton.matmul import INTERPRETED, _on
from awq_core.kernels.triton.rounding import rounded

HEADS = 8  # of a program


@triton.jit
def rotary_kernel(
    q_ptr,  # [B, Hq, T, D], D contiguous, as in all that follow; strides below
    k_ptr,  # [B, Hkv, T, D]
    v_ptr,
    cos_ptr,  # [B, T, R]
    sin_ptr,
    positions_ptr,  # int64 [T]
    turned_ptr,  # [B, Hq, T, D] contiguous
    cache_k_ptr,  # [B, Hkv, L, D]
    cache_v_ptr,
    Hq,
    Hkv,
    T,
    L,  # cells of the cache
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    angle_batch,
    cache_k_batch,
    cache_k_head,
    cache_k_cell,
    cache_v_batch,
    cache_v_head,
    cache_v_cell,
    D: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,  # D, up to a power of two
    HEADS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    token = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    of_queries = tl.cdiv(Hq, HEADS)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, WIDTH)
    first, turning = i < R // 2, i < R
    partner = tl.where(first, i + R // 2, i - R // 2)[None, :]
    at = batch * angle_batch + token * R + i
    cos = tl.load(cos_ptr + at, mask=turning, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + at, mask=turning, other=0.0).to(tl.float32)
    sin = tl.where(first, -sin, sin)[None, :]
    i, turning = i[None, :], turning[None, :]
    if tl.program_id(1) < of_queries:
        row = q_ptr + batch * q_batch + head * q_head + token.to(tl.int64) * q_token
        mask = (head < Hq) & (i < D)
        x = tl.load(row + i, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(row + partner, mask=mask & turning, other=0.0).to(tl.float32)
        to = turned_ptr + ((batch * Hq + head) * T + token) * D + i
        tl.store(to, rounded(x * cos + other * sin, turned_ptr.dtype.element_ty, BY_HAND), mask=mask)
    else:
        head -= of_queries * HEADS
        cell = tl.load(positions_ptr + token).to(tl.int64)
        row = k_ptr + batch * k_batch + head * k_head + token.to(tl.int64) * k_token
        # A cell the cache does not have is somebody else's memory.
        mask = (head < Hkv) & (i < D) & (cell >= 0) & (cell < L)
        x = tl.load(row + i, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(row + partner, mask=mask & turning, other=0.0).to(tl.float32)
        to = cache_k_ptr + batch * cache_k_batch + head * cache_k_head + cell * cache_k_cell + i
        tl.store(to, rounded(x * cos + other * sin, cache_k_ptr.dtype.element_ty, BY_HAND), mask=mask)
        value = tl.load(v_ptr + batch * v_batch + head * v_head + token.to(tl.int64) * v_token + i, mask=mask)
        to = cache_v_ptr + batch * cache_v_batch + head * cache_v_head + cell * cache_v_cell + i
        tl.store(to, value, mask=mask)


def rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """`blocks.rotate_and_store`.

    Raises:
        ValueError: shapes that do not belong together, another dtype in the cache, or a cache whose D is strided.
    """
    batch, heads, tokens, width = q.shape
    turning = cos.shape[-1]
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or k.shape[3] != width or positions.shape != (tokens,):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {len(positions)} positions")
    if cos.shape != sin.shape or cos.shape[:2] not in ((batch, tokens), (1, tokens)) or turning > width or turning % 2:
        raise ValueError(f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} for q {tuple(q.shape)}")
    for cache in (cache_k, cache_v):
        fits = cache.shape[:2] == k.shape[:2] and cache.shape[3] == width and cache.stride(3) == 1
        if not fits or cache.dtype != q.dtype or cache.shape != cache_k.shape:
            raise ValueError(f"a cache {tuple(cache.shape)} of {cache.dtype} for k {tuple(k.shape)} of {k.dtype}")
    q, k, v = (one if one.stride(3) == 1 else one.contiguous() for one in (q, k, v))
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (tokens, -(-heads // HEADS) + -(-k.shape[1] // HEADS), batch)
    if q.numel():
        with _on(q.device):
            rotary_kernel[grid](
                q,
                k,
                v,
                cos,
                sin,
                positions,
                turned,
                cache_k,
                cache_v,
                heads,
                k.shape[1],
                tokens,
                cache_k.shape[2],
                *q.stride()[:3],
                *k.stride()[:3],
                *v.stride()[:3],
                0 if len(cos) == 1 else cos.stride(0),
                *cache_k.stride()[:3],
                *cache_v.stride()[:3],
                D=width,
                R=turning,
                WIDTH=triton.next_power_of_2(width),
                HEADS=HEADS,
                BY_HAND=INTERPRETED and q.dtype is torch.bfloat16,
                num_warps=2,
            )
    return turned
