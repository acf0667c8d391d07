# mypy: allow-untyped-defs
"""Attention of one new token over a cache, its cells divided among programs (flash-decoding, Dao et al. 2023).

    s = cap(scale · q Kᵀ) + mask,   y = Σ exp(s − m) v / Σ exp(s − m),   m = max s

A program takes the query heads of one key-value head, so keys and values are read once for all of them, and a part of
the cells. It keeps the highest score m, the total of the weights and the weighted sum of the values, and scales the
latter two down whenever m grows. Parts are joined in the same way, by the last program to arrive, in the order of the
cells: the result does not depend on who was last. Cells that the mask leaves out are not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from awq_core.kernels.triton.matmul import COUNTERS, INTERPRETED, _counters, _on, _stream
from awq_core.kernels.triton.rounding import rounded
from awq_core.kernels.triton.tiles import device_class

BLOCK_BYTES = 8192  # keys of one step of the loop
WARPS, STAGES = 4, 3
MAX_ROWS = 32  # query heads of one program; the fewest are 16, what a tensor-core product takes
MAX_SPLIT = 64


@triton.jit
def attention_kernel(
    q_ptr,  # [B, Hq, D]
    k_ptr,  # [B, Hkv, L, D], D contiguous; strides below
    v_ptr,
    mask_ptr,  # [B or 1, L], uint8 or numbers to add, or None
    y_ptr,  # [B, Hq, D]
    partial_ptr,  # fp32 [B, Hq, SPLIT, D]; untouched where SPLIT is 1
    weights_ptr,  # fp32 [B, Hq, SPLIT, 2]: the highest score, the total of the weights
    arrived_ptr,  # int32, zero before and after
    Hkv,
    heads,  # query heads of a key-value head
    L,
    scale,
    softcap,
    k_batch,
    k_head,
    k_cell,
    v_batch,
    v_head,
    v_cell,
    mask_batch,
    mask_cell,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # D, up to a power of two
    ROWS: tl.constexpr,  # query heads of a program
    CELLS: tl.constexpr,  # of one step
    SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
    BY_HAND: tl.constexpr,  # bf16 in the interpreter: compute in fp32
):
    part = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row_blocks = tl.cdiv(heads, ROWS)
    pair = tl.program_id(1) // row_blocks
    row = tl.program_id(1) % row_blocks * ROWS + tl.arange(0, ROWS)
    head = (batch * Hkv + pair) * heads + row
    d = tl.arange(0, WIDTH)[None, :]
    real = (row < heads)[:, None] & (d < D)
    q = tl.load(q_ptr + head[:, None] * D + d, mask=real, other=0.0)
    if BY_HAND:
        q = q.to(tl.float32)
    step = tl.arange(0, CELLS)
    k_ptr += batch * k_batch + pair.to(tl.int64) * k_head
    v_ptr += batch * v_batch + pair.to(tl.int64) * v_head

    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    steps = tl.cdiv(L, CELLS)
    # 64-bit: a cache may hold more than 2³¹ numbers
    for block in range((steps * part // SPLIT).to(tl.int64), (steps * (part + 1) // SPLIT).to(tl.int64)):
        start = block * CELLS
        taking = start + step < L
        if mask_ptr is not None:
            bias = tl.load(mask_ptr + batch * mask_batch + (start + step) * mask_cell, mask=taking, other=0)
            if mask_ptr.dtype.element_ty == tl.uint8:
                taking = taking & (bias != 0)
            else:
                bias = bias.to(tl.float32)
                taking = taking & (bias > float("-inf"))
        inside = taking[:, None] & (d < D)
        k = tl.load(k_ptr + start * k_cell + step[:, None] * k_cell + d, mask=inside, other=0.0)
        if BY_HAND:
            k = k.to(tl.float32)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        if mask_ptr is not None and mask_ptr.dtype.element_ty != tl.uint8:
            score += bias[None, :]
        score = tl.where(taking[None, :], score, float("-inf"))
        weight, kept, highest = _step(score, highest)
        total = total * kept + tl.sum(weight, axis=1)
        v = tl.load(v_ptr + start * v_cell + step[:, None] * v_cell + d, mask=inside, other=0.0)
        if BY_HAND:
            v = v.to(tl.float32)
        acc = tl.dot(weight.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")

    if SPLIT == 1:
        _finish(acc, total, y_ptr + head[:, None] * D + d, real, BY_HAND)
    else:
        at = head * SPLIT + part
        tl.store(partial_ptr + at[:, None] * D + d, acc, mask=real)
        tl.store(weights_ptr + at * 2, highest, mask=row < heads)
        tl.store(weights_ptr + at * 2 + 1, total, mask=row < heads)
        tl.debug_barrier()  # every thread's sums are written before one of them counts the program as arrived
        counter = arrived_ptr + batch * tl.num_programs(1) + tl.program_id(1)
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            highest = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc = tl.zeros((ROWS, WIDTH), tl.float32)
            for i in range(SPLIT):  # .cg: from L2, where the others' stores are; L1 may hold something older
                at = head * SPLIT + i
                score = tl.load(weights_ptr + at * 2, mask=row < heads, other=float("-inf"), cache_modifier=".cg")
                weight, kept, highest = _step(score[:, None], highest)
                one = tl.load(weights_ptr + at * 2 + 1, mask=row < heads, other=0.0, cache_modifier=".cg")
                total = total * kept + tl.sum(weight, axis=1) * one
                value = tl.load(partial_ptr + at[:, None] * D + d, mask=real, other=0.0, cache_modifier=".cg")
                acc = acc * kept[:, None] + weight * value
            tl.store(counter, 0)
            _finish(acc, total, y_ptr + head[:, None] * D + d, real, BY_HAND)


@triton.jit
def _step(score, highest):
    """Weights of new scores, the factor of what was summed before, the highest score of all. No -inf minus -inf."""
    new = tl.maximum(highest, tl.max(score, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)
    return tl.exp(score - base[:, None]), tl.exp(highest - base), new


@triton.jit
def _finish(acc, total, to, real, BY_HAND: tl.constexpr):
    """Divide by the total of the weights; where no cell took part it is 0, and so is the sum."""
    y = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(to, rounded(y, to.dtype.element_ty, BY_HAND), mask=real)


def decode_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    *,
    split: int | None = None,
) -> torch.Tensor:
    """`blocks.decode_attention`; `split` programs share the cells of a head, by default as many as fill the GPU.

    Raises:
        ValueError: shapes or dtypes that do not belong together, or heads of more than 256 numbers.
    """
    batch, heads, tokens, width = q.shape
    pairs, length = cache_k.shape[1:3]
    fits = cache_k.shape == cache_v.shape == (batch, pairs, length, width) and heads % pairs == 0 and tokens == 1
    if not fits or width > 256 or not q.dtype == cache_k.dtype == cache_v.dtype:
        of = f"{tuple(cache_k.shape)} and {tuple(cache_v.shape)} of {cache_k.dtype}"
        raise ValueError(f"q {tuple(q.shape)} of {q.dtype} for caches {of}; one token, heads of 256 at the most")
    if mask is not None and mask.shape not in ((batch, 1, 1, length), (1, 1, 1, length)):
        raise ValueError(f"a mask {tuple(mask.shape)} for {batch} rows of {length} cells")
    cache_k, cache_v = (one if one.stride(3) == 1 else one.contiguous() for one in (cache_k, cache_v))
    if mask is not None and mask.dtype is torch.bool:
        mask = mask.view(torch.uint8)
    padded, rows, cells = sizes(heads // pairs, width)
    blocks = pairs * -(-heads // (pairs * rows))
    split = split or split_for(batch * blocks, -(-length // cells), device_class(q.device)[1])
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if split > 1:
        partial = torch.empty(batch, heads, split, width, dtype=torch.float32, device=q.device)
        weights = torch.empty(batch, heads, split, 2, dtype=torch.float32, device=q.device)
        arrived = _counters(q.device, _stream(q.device))
        if batch * blocks > COUNTERS:
            raise ValueError(f"split={split} with {batch * blocks} heads, more than {COUNTERS}")
    else:
        partial = weights = arrived = y
    if q.numel():
        with _on(q.device):
            attention_kernel[(split, blocks, batch)](
                q.contiguous(),
                cache_k,
                cache_v,
                mask,
                y,
                partial,
                weights,
                arrived,
                pairs,
                heads // pairs,
                length,
                scale,
                softcap,
                *cache_k.stride()[:3],
                *cache_v.stride()[:3],
                0 if mask is None or len(mask) == 1 else mask.stride(0),
                0 if mask is None else mask.stride(3),
                D=width,
                WIDTH=padded,
                ROWS=rows,
                CELLS=cells,
                SPLIT=split,
                CAPPED=softcap != 0,
                BY_HAND=INTERPRETED and q.dtype is torch.bfloat16,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return y


def sizes(heads: int, width: int) -> tuple[int, int, int]:
    """A head's width up to a power of two, query heads of a program, cells of a step; for `heads` of a pair's."""
    padded = max(16, triton.next_power_of_2(width))
    rows = min(MAX_ROWS, max(16, triton.next_power_of_2(heads)))
    return padded, rows, min(64, BLOCK_BYTES // (2 * padded))


def split_for(programs: int, steps: int, multiprocessors: int) -> int:
    """Smallest power of two that gives each multiprocessor 2 programs, of 2 steps at the least."""
    split = 1
    while programs * split < 2 * multiprocessors and steps >= 4 * split and split < MAX_SPLIT:
        split *= 2
    return split
