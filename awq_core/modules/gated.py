"""Gate and up as one product that is written once: silu(gate) · up, instead of both.

    y = silu(x · Wgateᵀ) · (x · Wupᵀ)          `awq::gated_linear`

Rows of gate and up in turn lie in one tile of the weight, so the program that has the one has the other. A kernel
without that, another activation, or another `forward` than the one below gets the product of both (`merged.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import SiLUActivation

from awq_core import kernels
from awq_core.kernels import operator
from awq_core.modules.fusing import canonical, forward_of, specialise
from awq_core.modules.merged import merge_products

GATED_MLP = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
PARTS = ["gate_proj", "up_proj"]


class GatedProduct(nn.Module):
    """silu(gate) · up of a quantized linear that holds gate's rows first and up's after them; they are reordered."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.linear = linear
        self.inner = linear.out_features // 2
        kernel = kernels.instance(linear.factory)
        assert isinstance(kernel, kernels.GatedKernel)
        for name, tensor in kernel.interleave(linear.state()).items():
            setattr(linear, name, tensor)
        if linear.bias is not None:
            linear.bias = linear.bias.view(2, -1).T.flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., inner]`."""
        linear = self.linear
        if torch.is_grad_enabled():  # the kernel is for inference
            gate, up = linear(x).unflatten(-1, (-1, 2)).unbind(-1)
            return functional.silu(gate) * up
        state = linear.state()
        rows = x.reshape(-1, linear.in_features).to(linear.weight_dtype)
        out = operator.gated_linear(rows, list(state.values()), list(state), linear.factory, self.inner, linear.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.inner)


class GatedInKernel:
    """An MLP whose gated product comes from one kernel."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down_proj(self.gated(x))
        return result


def merge_gated(module: nn.Module, merged: nn.Module | None, sizes: Mapping[str, int]) -> nn.Module:
    """Factory of a fused block: the MLP with a `GatedProduct` where that is possible, else with `merge_products`."""
    if not _gates(module, merged, sizes):
        return merge_products(module, merged, sizes)
    for path in sizes:
        delattr(module, path)
    module.gated = GatedProduct(merged)
    return specialise(module, GatedInKernel)


def _gates(module: nn.Module, merged: Any, sizes: Mapping[str, int]) -> bool:
    """Whether the kernel of the merged linear gates, and the module does nothing but what it does."""
    factory = getattr(merged, "factory", None)
    return (
        factory is not None
        and isinstance(kernels.instance(factory), kernels.GatedKernel)
        and list(sizes) == PARTS
        and len(set(sizes.values())) == 1
        and isinstance(getattr(module, "act_fn", None), (nn.SiLU, SiLUActivation))
        and forward_of(module) == canonical(GATED_MLP)
    )
