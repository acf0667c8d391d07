"""4-bit or 8-bit numbers to an int32 the plain way, as GPTQ and compressed-tensors do: neighbours, lowest bits first.

bits of word c   0-3   4-7   8-11   ...   28-31          0-7   8-15   16-23   24-31
holds            8c    8c+1  8c+2   ...   8c+7           4c    4c+1   4c+2    4c+3
"""

from __future__ import annotations

import torch


def pack_rows(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """uint8 [rows, columns] to int32 [ceil(rows · bits / 32), columns]: neighbours of a column share a word."""
    rows, columns = codes.shape
    per_word = 32 // bits
    words = torch.zeros(-(-rows // per_word), columns, dtype=torch.int32, device=codes.device)
    for place in range(per_word):
        part = codes[place::per_word]
        words[: len(part)] |= part.to(torch.int32) << (bits * place)
    return words


def pack_columns(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """uint8 [rows, columns] to int32 [rows, ceil(columns · bits / 32)]: neighbours of a row share a word."""
    return pack_rows(codes.t(), bits).t().contiguous()
