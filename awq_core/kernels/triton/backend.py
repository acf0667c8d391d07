"""The Triton backend: tile once at load, then one kernel for few tokens and dequantize + `torch.mm` for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch.nn import functional

from awq_core.checkpoint.pack import PackedLinear
from awq_core.kernels.triton import tuned
from awq_core.kernels.triton.dequantize import dequantize
from awq_core.kernels.triton.grouped import grouped_matmul, route, tile_for
from awq_core.kernels.triton.layout import GROUPS, TiledWeight, interleave_halves, tile
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
        tuned.use_file_for(packed.qweight.device)
        tiled = tile(packed)
        # Its shape alone says how many inputs are no padding: no number has to come back from the GPU.
        inputs = tiled.tiles.new_empty(packed.qweight.shape[0], 0)
        return {"tiles": tiled.tiles, "scales": tiled.scales, "zeros": tiled.zeros, "inputs": inputs}

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear_bias(x, state, None)

    def linear_bias(self, x: torch.Tensor, state: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """x · Wᵀ + bias, rounded once."""
        if x.numel() // max(1, x.shape[-1]) < CROSSOVER[device_class(x.device)[0]]:
            return matmul(x, _weight(state), bias=bias)
        return functional.linear(x, self.dequantize(state, x.dtype), bias)

    def interleave(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = interleave_halves(_weight(state))
        return {"tiles": made.tiles, "scales": made.scales, "zeros": made.zeros, "inputs": state["inputs"]}

    def gated_linear(self, x: torch.Tensor, state: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) · up, rounded once; after the product where there are many tokens."""
        if x.numel() // max(1, x.shape[-1]) < CROSSOVER[device_class(x.device)[0]]:
            return matmul(x, _weight(state), bias=bias, swiglu=True)
        gate, up = self.linear_bias(x, state, bias).unflatten(-1, (-1, 2)).unbind(-1)
        return functional.silu(gate) * up

    def stack(self, states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {name: torch.stack([one[name] for one in states]) for name in ("tiles", "scales", "zeros")} | {
            "inputs": states[0]["inputs"]
        }

    def unstack(self, state: dict[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
        return {name: tensor if name == "inputs" else tensor[expert] for name, tensor in state.items()}

    def grouped_linear(self, x: torch.Tensor, state: dict[str, torch.Tensor], choices: torch.Tensor) -> torch.Tensor:
        """The product over experts; one by one where each has many tokens."""
        weight = _weight(state)
        experts, pairs = len(weight.tiles), choices.numel()
        if pairs >= experts * CROSSOVER[device_class(x.device)[0]]:
            rows = x if len(x) == pairs else x.repeat_interleave(choices.shape[1], 0)
            y = x.new_empty(pairs, weight.out_features)
            for expert in range(experts):
                mine = (choices.flatten() == expert).nonzero().flatten()
                y[mine] = rows[mine] @ self.dequantize(self.unstack(state, expert), x.dtype).T
            return y
        tile = tile_for(x.device, x.dtype, weight, pairs)
        return grouped_matmul(x, weight, route(choices, experts, tile.tokens), tile)

    def dequantize(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in]."""
        return dequantize(_weight(state), len(state["inputs"]), dtype)

    def detail(self) -> str:
        return f"triton {triton.__version__}, {tuned.describe()}"


def _weight(state: dict[str, torch.Tensor]) -> TiledWeight:
    return TiledWeight(state["tiles"], state["scales"], state["zeros"])
