"""Torch's own int4 matrix product for CPUs, `aten::_weight_int4pack_mm_for_cpu`.

It computes (q − 8)·Δ + c with one pair (Δ, c) a group; AWQ's (q − z)·Δ is that with c = (8 − z)·Δ. Four limits shape
this file. It is fast in bf16 only (in other dtypes torch runs a scalar loop), so it is offered for bf16 models alone.
It knows groups of 32, 64, 128 and 256; a longer group is repeated as several of those. And c is rounded to bf16, an
error of about 2e-3 of the output, as large as that of the product itself. Its time grows with every row, so from
`CROSSOVER` rows on the weight is unpacked and multiplied the ordinary way.

The packed layout depends on the CPU and is never stored: columns come in blocks, inputs one after the other within a
block, two columns to a byte. Which two, and how wide a block is, is found by packing columns' own numbers.
"""

from __future__ import annotations

import functools

import torch

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.devices import dtype_name

GROUPS = (128, 64, 32)
OUT_MULTIPLE = 16
INNER_K_TILES = 2
PREPARED = 512  # columns laid out at a time
CROSSOVER = 512  # rows, measured


class Int4PackKernel:
    """bf16 activations, int4 weights."""

    def unsupported(self, packed: PackedLinear, dtype: torch.dtype) -> str:
        out = packed.scales.shape[1]
        if dtype is not torch.bfloat16:
            return f"{dtype_name(dtype)} activations would run a scalar loop; bfloat16 only"
        if out % OUT_MULTIPLE:
            return f"{out} outputs are not a multiple of {OUT_MULTIPLE}"
        if not any(packed.group_size % group == 0 for group in GROUPS):
            return f"group size {packed.group_size} is not a multiple of 32"
        return ""

    def prepare(self, packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        group = next(group for group in GROUPS if packed.group_size % group == 0)
        repeat = packed.group_size // group
        scales = packed.scales.float().repeat_interleave(repeat, 0)
        zeros = unpack(packed.qzeros).float().repeat_interleave(repeat, 0)
        pairs = torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16)  # [groups, out, 2]
        inputs, outputs = packed.qweight.shape[0], packed.scales.shape[1]
        weight = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
        # Torch wants one int32 a code; a few whole blocks of columns at a time keep that small.
        for first in range(0, outputs, PREPARED):
            codes = unpack(packed.qweight[:, first // 8 : (first + PREPARED) // 8]).T.to(torch.int32).contiguous()
            part = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES)
            weight[first : first + PREPARED] = part
        return {"weight": weight, "pairs": pairs.contiguous(), "group": torch.tensor(group)}

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if x.shape[0] >= CROSSOVER:
            return x @ self.dequantize(state, x.dtype).T
        group = int(state["group"])
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), state["weight"], group, state["pairs"])

    def dequantize(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight `[out, in]` the product works with, c rounded as above."""
        data, pairs, group = state["weight"].flatten(), state["pairs"].float(), int(state["group"])
        outputs, inputs = pairs.shape[1], pairs.shape[0] * group
        weight = torch.empty(outputs, inputs, dtype=dtype)
        width = block_width()
        for first in range(0, outputs, width):
            columns = min(width, outputs - first)
            scale, shift = pairs[:, first : first + columns].transpose(0, 1)[..., None].unbind(2)
            block = data[first * inputs // 2 : (first + columns) * inputs // 2].view(inputs, columns // 2)
            codes = torch.stack([block & 15, block >> 4], dim=2).flatten(1)[:, place_of_columns(columns)]
            grouped = codes.T.reshape(columns, -1, group).float()
            weight[first : first + columns] = ((grouped - 8) * scale + shift).reshape(columns, inputs)
        return weight


def _packed_numbers(columns: int) -> torch.Tensor:
    """The number of the column whose code lies in each nibble, in the order of the bytes, low nibble first."""
    numbers = torch.arange(columns, dtype=torch.int32)[:, None].expand(-1, 32)
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), INNER_K_TILES).flatten()
        for digit in (numbers % 16, numbers // 16)
    ]
    low, high = (torch.stack([one & 15, one >> 4], dim=1).flatten().int() for one in packed)
    return low + 16 * high


@functools.cache
def block_width() -> int:
    """Columns of a block on this CPU: the fewest that no other column is mixed with."""
    found = _packed_numbers(256)
    return next(width for width in (16, 32, 64, 128, 256) if int(found[: 32 * width].max()) < width)


@functools.cache
def place_of_columns(columns: int) -> torch.Tensor:
    """Where each column of a block lies among the nibbles of one input."""
    return _packed_numbers(columns)[:columns].argsort()
