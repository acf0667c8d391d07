"""The operations of a decoder block that are no matrix products, each as one pass over its data.

    rms_norm            h = x + r,   y = h / √(mean(h²) + ε) · (offset + w)
    rotate_and_store    q and k turned by the angles of their positions; k and v written into the cache
    decode_attention    y = softmax(cap(s · q Kᵀ) + mask) V      of one new token with all that the cache holds

Each is an operator of torch, so `torch.compile(fullgraph=True)` and graph capture go through a block without a break,
and has two implementations: plain torch, here, and Triton (`triton/norm.py`, `rotary.py`, `attention.py`). The rule is
that of the linears: Triton takes float16 and bfloat16 on a GPU, where `AWQ_KERNEL` names it or, without that, where its
backend comes before the reference.
They are for inference: a gradient through one of them is an error.
"""

from __future__ import annotations

import os

import torch
from torch.nn import functional

from awq_core.hooks.defaults import KERNEL_BACKENDS

PRIORITY = {backend.name: backend.priority for backend in KERNEL_BACKENDS}


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, residual: torch.Tensor | None = None, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square normalization of x + residual, over the last dimension.

    As in transformers: with an offset of 0 the normalized value is rounded to x's dtype before it meets the weight,
    with another one (weights stored as their distance from 1) only the product is rounded. Everything else is fp32.

    Args:
        x, residual: [..., H].
        weight: [H].

    Returns:
        normed, sum: [..., H] in the dtype of x; the sum is x + residual, or x itself.
    """
    if residual is None:
        return torch.ops.awq.rms_norm(x, weight, eps, offset), x
    normed, total = torch.ops.awq.add_rms_norm(x, residual, weight, eps, offset)
    return normed, total


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
    """Rotary embedding of q and k (RoFormer, eq. 34, the two halves of a head as pairs); k and v go into the cache.

    Args:
        q: [B, Hq, T, D].
        k, v: [B, Hkv, T, D].
        cos, sin: [B or 1, T, R] with R even and at most D; what a head holds beyond R is not turned.
        cache_k, cache_v: [B, Hkv, L, D], written in place.
        positions: [T], int64: the cells of the cache that take k and v. No two are the same. Beyond the cache, a GPU
            writes nothing and the CPU raises an IndexError.

    Returns:
        q, rotated: [B, Hq, T, D].
    """
    result: torch.Tensor = torch.ops.awq.rotate_and_store(q, k, v, cos, sin, cache_k, cache_v, positions)
    return result


def decode_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Attention of one new token over a cache; query head h reads the key-value head h · Hkv // Hq.

    Args:
        q: [B, Hq, 1, D].
        cache_k, cache_v: [B, Hkv, L, D].
        mask: [B or 1, 1, 1, L], True where a cell takes part, or numbers added to the scores; None: all take part.
        softcap: scores become softcap · tanh(score / softcap) before the mask; 0 leaves them.

    Returns:
        [B, Hq, 1, D] in the dtype of q; zeros where no cell takes part.
    """
    result: torch.Tensor = torch.ops.awq.decode_attention(q, cache_k, cache_v, mask, scale, softcap)
    return result


# -- plain torch ------------------------------------------------------------------------------------------------------


def plain_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` in torch's own operations."""
    total = x if residual is None else x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * (offset + weight.float()) if offset else weight * wide.to(x.dtype)
    return normed.to(x.dtype).contiguous(), total.contiguous()


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, H, T, D] turned by cos, sin [B or 1, T, R]."""
    turning, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def plain_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """`decode_attention` in torch's own operations; the query heads of a key-value head are rows of one product."""
    rows = q.reshape(k.shape[0], k.shape[1], -1, q.shape[-1])
    if softcap:
        scores = softcap * torch.tanh(rows.float() @ k.float().transpose(-1, -2) * (scale / softcap))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        out = (scores.softmax(-1).nan_to_num(0.0) @ v.float()).to(q.dtype)  # a row of -inf has a softmax of NaN
    else:
        mask = mask if mask is None or mask.dtype is torch.bool else mask.to(q.dtype)
        out = functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape)


# -- operators --------------------------------------------------------------------------------------------------------


def on_triton(x: torch.Tensor) -> bool:
    """Whether x is for Triton's kernels: 16 bits, on a GPU or, in tests, in its interpreter; and they are wanted."""
    name = os.environ.get("AWQ_KERNEL") or ("triton" if PRIORITY["triton"] > PRIORITY["reference"] else "reference")
    there = x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return name == "triton" and there and x.dtype in (torch.float16, torch.bfloat16)


@torch.library.custom_op(
    "awq::rms_norm", mutates_args=(), schema="(Tensor x, Tensor weight, float eps, float offset) -> Tensor"
)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    if on_triton(x):
        from awq_core.kernels.triton import norm

        return norm.rms_norm(x, None, weight, eps, offset)[0]
    return plain_rms_norm(x, None, weight, eps, offset)[0]


@torch.library.custom_op(
    "awq::add_rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
)
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if on_triton(x):
        from awq_core.kernels.triton import norm

        return norm.rms_norm(x, residual, weight, eps, offset)
    return plain_rms_norm(x, residual, weight, eps, offset)


@torch.library.custom_op(
    "awq::rotate_and_store",
    mutates_args=("cache_k", "cache_v"),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, Tensor(b!) cache_v, "
    "Tensor positions) -> Tensor",
)
def _rotate_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    if on_triton(q):
        from awq_core.kernels.triton import rotary

        return rotary.rotate_and_store(q, k, v, cos, sin, cache_k, cache_v, positions)
    cache_k.index_copy_(2, positions, plain_rotate(k, cos, sin).to(cache_k.dtype))
    cache_v.index_copy_(2, positions, v.to(cache_v.dtype))
    return plain_rotate(q, cos, sin).contiguous()


@torch.library.custom_op(
    "awq::decode_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor cache_k, Tensor cache_v, Tensor? mask, float scale, float softcap) -> Tensor",
)
def _decode_attention(
    q: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    if on_triton(q):
        from awq_core.kernels.triton import attention

        return attention.decode_attention(q, cache_k, cache_v, mask, scale, softcap)
    return plain_attention(q, cache_k, cache_v, mask, scale, softcap).contiguous()


def _like(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


_rms_norm.register_fake(_like)
_add_rms_norm.register_fake(lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)))
_rotate_and_store.register_fake(_like)
_decode_attention.register_fake(_like)
