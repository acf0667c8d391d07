"""Eight 4-bit numbers to an int32 the plain way, as GPTQ and compressed-tensors do: neighbours, lowest bits first.

bits of word c   0-3   4-7   8-11   ...   28-31
holds            8c    8c+1  8c+2   ...   8c+7
"""

from __future__ import annotations

import torch

from awq_core.checkpoint.pack import PER_WORD


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] to int32 [ceil(rows / 8), columns]: eight neighbours of a column share a word."""
    rows, columns = codes.shape
    count = -(-rows // PER_WORD)
    words = torch.zeros(count, columns, dtype=torch.int32, device=codes.device)
    for nibble in range(PER_WORD):
        part = codes[nibble::PER_WORD]
        words[: len(part)] |= part.to(torch.int32) << (4 * nibble)
    return words


def pack_columns(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns] to int32 [rows, ceil(columns / 8)]: eight neighbours of a row share a word."""
    return pack_rows(codes.t()).t().contiguous()
