"""The product over experts: each token with the weights of the experts it was sent to.

A router sends every token to `top_k` of E experts. Each of those pairs is one row of the result,

    y[t · top_k + i] = x[t] · W[choices[t, i]]ᵀ

A program of `matmul.py` computes a block of rows with *one* weight, so pairs are sorted by expert, and each expert's
are filled up to whole blocks with slots that hold no pair. How many blocks that makes is known on the GPU only; room
for the most there can be is given, blocks that are not needed end at once, and no number has to come back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from awq_core.kernels.triton.layout import BLOCK, TiledWeight
from awq_core.kernels.triton.matmul import launch, stored_dtype
from awq_core.kernels.triton.tiles import Tile, choose, device_class, split_for


@dataclass(frozen=True, slots=True)
class Routing:
    """Pairs of tokens and experts, sorted into blocks of one expert.

    Attributes:
        experts: int32 [blocks], -1 for a block not needed.
        pairs: int32 [blocks * size], token · top_k + i, or the number of pairs in an empty slot.
        tokens, top_k, size: of the choices; slots of a block.
    """

    experts: torch.Tensor
    pairs: torch.Tensor
    tokens: int
    top_k: int
    size: int


def route(choices: torch.Tensor, experts: int, size: int) -> Routing:
    """Sort the pairs of `choices` [tokens, top_k], expert numbers, into blocks of `size`."""
    tokens, top_k = choices.shape
    chosen = choices.flatten().long()
    order = chosen.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.long, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    ends = (-(-counts // size) * size).cumsum(0)  # of each expert's slots
    # The i-th pair in order goes as far into its expert's slots as it is into its expert's pairs.
    expert = chosen[order]
    into = torch.arange(len(chosen), device=chosen.device) - (counts.cumsum(0) - counts)[expert]
    slot = torch.where(expert > 0, ends[expert - 1], 0) + into
    blocks = len(chosen) // size + min(experts, len(chosen))
    pairs = torch.full((blocks * size,), len(chosen), dtype=torch.int32, device=chosen.device)
    pairs[slot] = order.to(torch.int32)
    first = torch.arange(blocks, device=chosen.device) * size
    owner = torch.searchsorted(ends, first, right=True)
    return Routing(torch.where(owner < experts, owner, -1).to(torch.int32), pairs, tokens, top_k, size)


def stack(weights: list[TiledWeight]) -> TiledWeight:
    """The weights of all experts, of one shape and group size, as one."""
    return TiledWeight(
        torch.stack([one.tiles for one in weights]),
        torch.stack([one.scales for one in weights]),
        torch.stack([one.zeros for one in weights]),
    )


def tile_for(device: torch.device, dtype: torch.dtype, weight: TiledWeight, pairs: int) -> Tile:
    """The tile for so many pairs: that of `tiles.choose` for the tokens an expert sees on average."""
    experts, blocks = len(weight.tiles), weight.tiles.shape[-3]
    kind, multiprocessors = device_class(device)
    each = max(1, -(-pairs // experts))
    tile = choose(kind, multiprocessors, dtype, weight.out_features, blocks * BLOCK, weight.group, each)
    programs = -(-weight.out_features // tile.rows) * (pairs // tile.tokens + min(experts, pairs))
    return replace(tile, split=split_for(programs, blocks, tile.tokens, multiprocessors))


def grouped_matmul(
    x: torch.Tensor, weight: TiledWeight, routing: Routing, tile: Tile, *, swiglu: bool = False
) -> torch.Tensor:
    """y [tokens · top_k, N], or [.., N / 2] of gate and up in turn; the order is that of the choices.

    Args:
        x: [tokens, K], or [tokens · top_k, K]: the result of another such product.
        weight: `stack` of the experts' weights.
        tile: as of `tile_for`; its tokens are the routing's block size.

    Raises:
        ValueError: the tile or x does not fit the routing.
    """
    pairs = routing.tokens * routing.top_k
    if tile.tokens != routing.size:
        raise ValueError(f"a tile of {tile.tokens} tokens for blocks of {routing.size}")
    if len(x) not in (routing.tokens, pairs):
        raise ValueError(f"{len(x)} rows for {routing.tokens} tokens and {pairs} pairs")
    width = weight.out_features // 2 if swiglu else weight.out_features
    y = torch.empty(pairs, width, dtype=stored_dtype(x.dtype), device=x.device)
    if pairs:
        top_k = 1 if len(x) == pairs else routing.top_k
        launch(x.contiguous(), weight, y, tile, swiglu=swiglu, routing=(routing.experts, routing.pairs, top_k))
    return y.to(x.dtype)
