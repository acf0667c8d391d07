"""Torch's own int4 matrix product for CPUs, `aten::_weight_int4pack_mm_for_cpu`.

It computes (q − 8)·Δ + c with one pair (Δ, c) a group; AWQ's (q − z)·Δ is that with c = (8 − z)·Δ. Three limits shape
this file. It is fast in bf16 only (in other dtypes torch runs a scalar loop), so it is offered for bf16 models alone.
It knows groups of 32, 64, 128 and 256; a longer group is repeated as several of those. And c is rounded to bf16, an
error of about 2e-3 of the output, as large as that of the product itself. Its packed layout depends on the CPU and is
never stored.
"""

from __future__ import annotations

import torch

from awq_core.checkpoint.pack import PackedLinear, unpack

GROUPS = (128, 64, 32)
OUT_MULTIPLE = 16
INNER_K_TILES = 2


class Int4PackKernel:
    """bf16 activations, int4 weights."""

    def unsupported(self, packed: PackedLinear, dtype: torch.dtype) -> str:
        out = packed.scales.shape[1]
        if dtype is not torch.bfloat16:
            return f"{str(dtype).removeprefix('torch.')} activations would run a scalar loop; bfloat16 only"
        if out % OUT_MULTIPLE:
            return f"{out} outputs are not a multiple of {OUT_MULTIPLE}"
        if not any(packed.group_size % group == 0 for group in GROUPS):
            return f"group size {packed.group_size} is not a multiple of 32"
        return ""

    def prepare(self, packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        group = next(group for group in GROUPS if packed.group_size % group == 0)
        repeat = packed.group_size // group
        codes = unpack(packed.qweight).T.to(torch.int32).contiguous()  # [out, in]
        scales = packed.scales.float().repeat_interleave(repeat, 0)
        zeros = unpack(packed.qzeros).float().repeat_interleave(repeat, 0)
        pairs = torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16)  # [groups, out, 2]
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER_K_TILES)
        return {"weight": weight, "pairs": pairs.contiguous(), "group": torch.tensor(group)}

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        group = int(state["group"])
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), state["weight"], group, state["pairs"])
