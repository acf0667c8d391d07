"""The Triton backend: tile once at load, then one kernel for few tokens and dequantize + `torch.mm` for many."""

from __future__ import annotations

import torch
import triton

from awq_core.checkpoint.pack import PackedLinear
from awq_core.kernels.triton.dequantize import dequantize
from awq_core.kernels.triton.layout import GROUPS, TiledWeight, tile
from awq_core.kernels.triton.matmul import INTERPRETED, counter_pool, matmul
from awq_core.kernels.triton.tiles import CROSSOVER, device_class


class TritonKernel:
    """fp16 and bf16 activations, int4 weights, on NVIDIA and AMD GPUs; on the CPU only in Triton's interpreter."""

    def unsupported(self, packed: PackedLinear, dtype: torch.dtype) -> str:
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{str(dtype).removeprefix('torch.')} activations; float16 or bfloat16 only"
        if packed.group_size not in GROUPS and packed.group_size != packed.qweight.shape[0]:
            return f"group size {packed.group_size} is not 32, 64, 128 or a whole row"
        on_gpu = packed.qweight.device.type == "cuda"
        if on_gpu and INTERPRETED:
            return "TRITON_INTERPRET is set: kernels run on the CPU"
        if not on_gpu and not INTERPRETED:
            return "no GPU (TRITON_INTERPRET=1 interprets it, slowly, for tests)"
        return ""

    def prepare(self, packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        counter_pool(packed.qweight.device)
        tiled = tile(packed)
        # Its shape alone says how many inputs are no padding: no number has to come back from the GPU.
        inputs = tiled.tiles.new_empty(packed.qweight.shape[0], 0)
        return {"tiles": tiled.tiles, "scales": tiled.scales, "zeros": tiled.zeros, "inputs": inputs}

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if x.numel() // max(1, x.shape[-1]) >= CROSSOVER[device_class(x.device)[0]]:
            return x @ self.dequantize(state, x.dtype).T
        return matmul(x, _weight(state))

    def dequantize(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]."""
        return dequantize(_weight(state), len(state["inputs"]), dtype)

    def detail(self) -> str:
        return f"triton {triton.__version__}, tiles not tuned"


def _weight(state: dict[str, torch.Tensor]) -> TiledWeight:
    return TiledWeight(state["tiles"], state["scales"], state["zeros"])
