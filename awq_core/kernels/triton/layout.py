"""How the Triton kernels want a 4-bit weight: 16-bit words of four nibble planes, in tiles of 4 KB.

A block is 128 inputs (k) of one output (n). Its 128 codes lie in 32 words of 16 bits, and plane j of all 32 words
holds 32 *neighbouring* inputs:

    word r of block b of row n                        bits 12-15   8-11     4-7     0-3
    holds the code of input k = 128b + 32j + r           j = 3    j = 2   j = 1   j = 0        r = 0 .. 31

so one plane of a row is, without any shuffling, the 32 inputs that a tensor-core product takes from memory, and a
group of 32, 64 or 128 inputs is one, two or four planes. One layout serves every group size.

64 rows of a block are one tile, 64 x 32 words = 4096 bytes in one piece; a program that reads a tile reads whole
DRAM pages. Rows and inputs are padded to whole tiles with code 0, which no product ever sees: padded inputs meet an
activation of 0, padded rows are not stored.

    tensor   dtype               shape                       meaning
    tiles    int16               [⌈N/64⌉, ⌈K/128⌉, 64, 32]   codes; word [n // 64, k // 128, n % 64, k % 32]
    scales   as the checkpoint   [groups, N]                 Δ
    zeros    uint8               [groups, N]                 z, 0..15

    W[n, k] = (code − z[g, n]) · Δ[g, n],   g = k // group; groups = ⌈K/128⌉ · 128 / group, or 1 for a whole row

At 128 inputs a group and fp16 scales this is 4.1875 bits a weight: at most 3.82 times faster than 16 bits can be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from awq_core.checkpoint.pack import PackedLinear, pack, unpack

ROWS = 64
BLOCK = 128
WORDS = 32
PLANES = 4
GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class TiledWeight:
    """A 4-bit weight [N, K] in the layout of this file; or one for each of several experts, stacked in front."""

    tiles: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def out_features(self) -> int:
        """N, without padding."""
        return self.scales.shape[-1]

    @property
    def group(self) -> int:
        """Inputs that share a scale, or 0 where a whole row does."""
        groups = self.scales.shape[-2]
        return 0 if groups == 1 else self.tiles.shape[-3] * BLOCK // groups


def tile(packed: PackedLinear) -> TiledWeight:
    """Repack a checkpoint's linear, on its device. Exact: `untile` gives the codes back.

    Raises:
        ValueError: groups are of a size that no number of planes makes up.
    """
    inputs, group = packed.qweight.shape[0], packed.group_size
    if group not in GROUPS and group != inputs:
        raise ValueError(f"groups of {group} inputs; only 32, 64, 128 and whole rows can be tiled")
    scales, zeros = packed.scales, unpack(packed.qzeros)
    if group != inputs:
        missing = -(-inputs // BLOCK) * BLOCK // group - len(scales)
        scales, zeros = pad(scales, (0, 0, 0, missing)), pad(zeros, (0, 0, 0, missing))
    return TiledWeight(_tile_codes(unpack(packed.qweight).T), scales.contiguous(), zeros.contiguous())


def _tile_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, K] as tiles."""
    rows, inputs = codes.shape
    padded = pad(codes, (0, -inputs % BLOCK, 0, -rows % ROWS))
    blocks = padded.view(-1, ROWS, padded.shape[1] // BLOCK, PLANES, WORDS).transpose(1, 2)
    words = torch.zeros(*blocks.shape[:3], WORDS, dtype=torch.int16, device=codes.device)
    for plane in range(PLANES):
        words |= blocks[..., plane, :].to(torch.int16) << (4 * plane)
    return words


def untile(weight: TiledWeight) -> torch.Tensor:
    """uint8 codes with their padding, [⌈N/64⌉ · 64, ⌈K/128⌉ · 128]."""
    planes = [(weight.tiles >> (4 * plane)) & 15 for plane in range(PLANES)]
    blocks = torch.stack(planes, dim=3).to(torch.uint8).transpose(1, 2)
    return blocks.reshape(-1, weight.tiles.shape[1] * BLOCK)


def interleave(gate: PackedLinear, up: PackedLinear) -> PackedLinear:
    """One linear with gate's row i at 2i and up's at 2i + 1: what the SwiGLU epilogue of `matmul` reads.

    Both rows of a pair then lie in one tile, so one program has all it needs.
    """

    def rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([a, b], dim=-1).flatten(1)

    return PackedLinear(
        qweight=pack(rows(unpack(gate.qweight), unpack(up.qweight))),
        qzeros=pack(rows(unpack(gate.qzeros), unpack(up.qzeros))),
        scales=rows(gate.scales, up.scales),
    )


def interleave_halves(weight: TiledWeight) -> TiledWeight:
    """The same for one weight with gate's rows first and up's after them, tiled already."""
    count = weight.out_features
    order = torch.arange(count, device=weight.tiles.device).view(2, -1).T.flatten()
    rows = weight.tiles.transpose(1, 2).flatten(0, 1)  # [⌈N/64⌉ · 64, blocks, words]
    moved = torch.zeros_like(rows)
    moved[:count] = rows[order]
    tiles = moved.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
    return TiledWeight(tiles, weight.scales[:, order], weight.zeros[:, order])
