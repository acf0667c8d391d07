# mypy: allow-untyped-defs
"""y = x · Wᵀ with a 4-bit W, for one to a few hundred tokens.

One program computes a block of y: `rows` outputs by `tokens` tokens, over all or part of the inputs. The weight is the
*left* operand of the tensor-core product, so a single token fills 8 columns of it instead of 16 or 64 rows, and the
same kernel serves decoding and small batches. For each block of 128 inputs (`layout.py`) and each of its four planes:

    c = (1024 + q) − (1024 + z)         the integers q − z, exact in fp16 and bf16         `planes.py`
    p += c · xᵀ                         fp32, on tensor cores
    acc += p · Δ                        after each group, in fp32

The scale is applied to sums instead of weights: fewer operations, and no rounding of q − z times Δ to 16 bits.

With few outputs there are too few programs to keep a GPU busy, so `split` programs share the inputs of one block of y.
Each writes its partial sum; the last to arrive adds them all up *in the order of the inputs*, so the result does not
depend on who was last, then adds bias and residual and sets its counter back to zero for the next call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import count

import torch
import triton
import triton.language as tl

from awq_core.kernels.triton.layout import BLOCK, ROWS, TiledWeight
from awq_core.kernels.triton.planes import codes_of, zero_of
from awq_core.kernels.triton.tiles import Tile, choose, device_class

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Counters of arrived programs, one for each block of y; work is split only while blocks are few. A set for each stream.
COUNTERS = 2048
STREAMS = 64
_NEXT_SET = count()


@triton.jit
def matmul_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    tiles_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,  # [N] or None
    residual_ptr,  # of the shape of y, or None
    y_ptr,  # [M, N]; with SWIGLU [M, N / 2]
    partial_ptr,  # fp32 [SPLIT, M, N]; untouched where SPLIT is 1
    arrived_ptr,  # int32, zero before and after
    M,
    N,
    K,
    blocks,
    x_stride,
    experts_ptr,  # of mixtures (`grouped.py`), else None: the expert of each block of tokens, or -1
    pairs_ptr,  # the row of y of each of its slots, M or more where none
    top_k,  # rows of y for one row of x
    OUTPUTS: tl.constexpr,  # outputs of a program, a multiple of 64
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,  # 32, 64, 128, or 0 for a whole row
    EVEN_N: tl.constexpr,  # N is a multiple of OUTPUTS
    EVEN_K: tl.constexpr,  # K is a multiple of 128
    BF16: tl.constexpr,
    ASM: tl.constexpr,
    WIDE: tl.constexpr,  # compute in fp32: Triton's interpreter cannot compute in bf16
    SWIGLU: tl.constexpr,
):
    row_block = tl.program_id(0)
    part = tl.program_id(1)
    token_block = tl.program_id(2)
    row = tl.arange(0, OUTPUTS)
    n = row_block * OUTPUTS + row
    m = token_block * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, 32)
    # Planes that share a scale, and rows of `scales` that one block of inputs has.
    SHARING: tl.constexpr = GROUP // 32 if GROUP else 4
    PER_BLOCK: tl.constexpr = 4 // SHARING if GROUP else 0
    first, last = blocks * part // SPLIT, blocks * (part + 1) // SPLIT
    x_row = m
    if experts_ptr is not None:
        expert = tl.load(experts_ptr + token_block).to(tl.int64)
        m = tl.load(pairs_ptr + m)
        x_row = m // top_k
        last = tl.where(expert < 0, first, last)
        groups = blocks * PER_BLOCK if GROUP else 1
        tiles_ptr += expert * tl.num_programs(0) * (OUTPUTS // 64) * blocks * 2048
        scales_ptr += expert * groups * N
        zeros_ptr += expert * groups * N
    of_tile = (row_block * (OUTPUTS // 64) + row // 64) * blocks
    words_ptr = tiles_ptr + (of_tile * 2048 + (row % 64) * 32)[:, None] + r[None, :]
    x_ptrs = x_ptr + x_row[None, :] * x_stride + r[:, None]

    acc = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for block in range(first, last):
        words = tl.load(words_ptr + block * 2048, eviction_policy="evict_first")
        for plane in tl.static_range(4):
            if plane % SHARING == 0:
                at = (block * PER_BLOCK + plane // SHARING) * N + n
                scale = tl.load(scales_ptr + at, mask=EVEN_N | (n < N), other=0.0).to(tl.float32)
                zero = tl.load(zeros_ptr + at, mask=EVEN_N | (n < N), other=0)
                product = tl.zeros((OUTPUTS, TOKENS), tl.float32)
            k = block * 128 + plane * 32 + r
            inside = (m[None, :] < M) & (EVEN_K | (k[:, None] < K))
            x = tl.load(x_ptrs + (block * 128 + plane * 32), mask=inside, other=0.0)
            code = codes_of(words, plane, BF16, ASM)
            offset = zero_of(zero, plane, BF16)
            if WIDE:
                x, code, offset = x.to(tl.float32), code.to(tl.float32), offset.to(tl.float32)
            product = tl.dot(code - offset[:, None], x, product, input_precision="ieee")
            if plane % SHARING == SHARING - 1:
                acc += product * scale[:, None]

    if SPLIT == 1:
        _finish(acc, bias_ptr, residual_ptr, y_ptr, n, m, row_block, M, N, OUTPUTS, TOKENS, SWIGLU)
    else:
        at = m[None, :] * N + n[:, None]
        inside = (m[None, :] < M) & (n[:, None] < N)
        tl.store(partial_ptr + part * M * N + at, acc, mask=inside)
        tl.debug_barrier()  # every thread's sums are written before one of them counts the program as arrived
        counter = arrived_ptr + token_block * tl.num_programs(0) + row_block
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
            for i in range(SPLIT):  # .cg: from L2, where the others' stores are; L1 may hold something older
                total += tl.load(partial_ptr + i * M * N + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
            _finish(total, bias_ptr, residual_ptr, y_ptr, n, m, row_block, M, N, OUTPUTS, TOKENS, SWIGLU)


@triton.jit
def _finish(
    acc,
    bias_ptr,
    residual_ptr,
    y_ptr,
    n,
    m,
    row_block,
    M,
    N,
    OUTPUTS: tl.constexpr,
    TOKENS: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Add the bias, make silu(gate) · up of neighbouring rows, add the residual, store."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if SWIGLU:
        pairs = tl.permute(tl.reshape(acc, (OUTPUTS // 2, 2, TOKENS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        acc = gate * tl.sigmoid(gate) * up
        n = row_block * (OUTPUTS // 2) + tl.arange(0, OUTPUTS // 2)
        N = N // 2
    at = m[None, :] * N + n[:, None]
    inside = (m[None, :] < M) & (n[:, None] < N)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


def matmul(
    x: torch.Tensor,
    weight: TiledWeight,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x · Wᵀ + bias + residual, summed in fp32 and rounded once.

    Args:
        x: [..., K] in float16 or bfloat16, zero tokens included.
        bias: [N], any floating dtype.
        residual: of the shape of the result.
        swiglu: W's rows are gate and up in turn (`layout.interleave`); the result is silu(gate) · up [..., N / 2].
        tile: how to divide the work; by default what `tiles.choose` says for this device.

    Raises:
        ValueError: shapes do not belong together, or x is of another dtype.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}; float16 or bfloat16 only")
    inputs, outputs, blocks = x.shape[-1], weight.out_features, weight.tiles.shape[-3]
    width = outputs // 2 if swiglu else outputs
    if blocks != -(-inputs // BLOCK):
        raise ValueError(f"x has {inputs} inputs, the weight about {blocks * BLOCK}")
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    tokens = len(rows)
    if residual is not None:
        residual = residual.reshape(tokens, width).contiguous()
    y = torch.empty(tokens, width, dtype=stored_dtype(x.dtype), device=x.device)
    if tokens:
        tile = tile or choose(*device_class(x.device), x.dtype, outputs, inputs, weight.group, tokens)
        launch(rows, weight, y, tile, bias=bias, residual=residual, swiglu=swiglu)
    return y.to(x.dtype).reshape(*x.shape[:-1], width)


def stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes: Triton's interpreter rounds to bf16 wrongly, so there it is fp32, and torch rounds."""
    return torch.float32 if INTERPRETED and dtype is torch.bfloat16 else dtype


def launch(
    x: torch.Tensor,
    weight: TiledWeight,
    y: torch.Tensor,
    tile: Tile,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    swiglu: bool = False,
    routing: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> None:
    """Start the kernel for x [rows, K] and y [tokens, N]; `routing` is `experts_ptr`, `pairs_ptr`, `top_k`."""
    outputs, tokens, inputs = weight.out_features, len(y), x.shape[1]
    padded = weight.tiles.shape[-4] * ROWS
    if padded % tile.rows:
        tile = tile.halved()
    experts, pairs, top_k = routing or (None, None, 1)
    token_blocks = -(-tokens // tile.tokens) if experts is None else len(experts)
    grid = (padded // tile.rows, tile.split, token_blocks)
    if tile.split > 1:
        partial = torch.empty(tile.split, tokens, outputs, dtype=torch.float32, device=x.device)
        arrived = _counters(x.device, _stream(x.device))
        if grid[0] * grid[2] > COUNTERS:
            raise ValueError(f"split={tile.split} with {grid[0] * grid[2]} blocks of y, more than {COUNTERS}")
    else:
        partial = arrived = y
    with _on(x.device):
        matmul_kernel[grid](
            x,
            weight.tiles,
            weight.scales,
            weight.zeros,
            bias,
            residual,
            y,
            partial,
            arrived,
            tokens,
            outputs,
            inputs,
            weight.tiles.shape[-3],
            x.stride(0),
            experts,
            pairs,
            top_k,
            OUTPUTS=tile.rows,
            TOKENS=tile.tokens,
            SPLIT=tile.split,
            GROUP=weight.group,
            EVEN_N=outputs % tile.rows == 0,
            EVEN_K=inputs % BLOCK == 0,
            BF16=x.dtype is torch.bfloat16,
            ASM=x.device.type == "cuda" and torch.version.hip is None,
            WIDE=INTERPRETED and x.dtype is torch.bfloat16,
            SWIGLU=swiglu,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


@cache
def counter_pool(device: torch.device) -> torch.Tensor:
    """Zeros that every call leaves as zeros. Never freed or moved, so a captured graph may hold them.

    Made when a weight is prepared: what is allocated while a graph is captured is not zero before the graph has run.
    """
    return torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)


@cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    """One stream's: calls of two streams run at the same time."""
    return counter_pool(device)[next(_NEXT_SET) % STREAMS]


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
