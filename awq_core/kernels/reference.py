"""The reference kernel: plain torch, correct everywhere, the oracle of every other backend.

    y = x · Wᵀ,        W[o, i] = (q[i, o] − z[g, o]) · Δ[g, o],        g = i // group_size

Codes and zero points are unpacked from the checkpoint's own tensors (`awq_core.checkpoint.pack` has the table) at
every call, so memory stays at 4 bits a weight and speed is that of the unpacking.
"""

from __future__ import annotations

import torch

from awq_core.checkpoint.pack import PackedLinear, dequantize


class ReferenceKernel:
    """Dequantize, then `matmul`, in the dtype of the input."""

    def unsupported(self, packed: PackedLinear, dtype: torch.dtype) -> str:
        return ""

    def prepare(self, packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = dequantize(PackedLinear(state["qweight"], state["qzeros"], state["scales"]), torch.float32)
        return x @ weight.to(x.dtype).T
