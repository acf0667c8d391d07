"""`QuantLinear`: a linear whose weight is 4 bits, in whatever layout its kernel wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from awq_core import kernels
from awq_core.checkpoint.pack import PackedLinear, dequantize
from awq_core.hooks.defaults import KERNEL_BACKENDS
from awq_core.hooks.types import KernelBackend
from awq_core.kernels import operator


class QuantLinear(nn.Module):
    """y = x · Wᵀ + bias with a 4-bit W. Differentiable in x; `torch.compile` and `torch.export` see one operator.

    Attributes:
        in_features, out_features, group_size: as in the checkpoint.
        backend, factory: name of the kernel that runs it, and what makes it.
        state_names: names of the buffers that kernel prepared.
        weight_dtype: dtype of activations the kernel was prepared for.
    """

    def __init__(
        self,
        packed: PackedLinear,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        *,
        backends: Sequence[KernelBackend] = KERNEL_BACKENDS,
    ) -> None:
        super().__init__()
        self.in_features = packed.qweight.shape[0]
        self.out_features = packed.scales.shape[1]
        self.group_size = packed.group_size
        self.weight_dtype = dtype
        device = packed.qweight.device.type
        self.backend, kernel, self.factory = kernels.choose(packed, dtype, device=device, backends=backends)
        state = kernel.prepare(packed, dtype)
        for name, tensor in state.items():
            self.register_buffer(name, tensor, persistent=False)
        self.state_names = list(state)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", None if bias is None else bias.to(dtype), persistent=False)

    def state(self) -> dict[str, torch.Tensor]:
        """What the kernel prepared."""
        return {name: getattr(self, name) for name in self.state_names}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]` -> `[..., out]`, in the dtype of x."""
        rows = x.reshape(-1, self.in_features).to(self.weight_dtype)
        state = [getattr(self, name) for name in self.state_names]
        out = operator.linear(rows, state, self.state_names, self.factory, self.out_features, self.bias)
        return out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bias={self.bias is not None}, kernel={self.backend}"
        )


def fake_quantized(packed: PackedLinear, bias: torch.Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """An ordinary linear that holds the dequantized weight: what a `QuantLinear` must agree with."""
    linear = nn.Linear(packed.qweight.shape[0], packed.scales.shape[1], bias=bias is not None, dtype=dtype)
    linear.weight.data = dequantize(packed, dtype)
    if bias is not None:
        linear.bias.data = bias.to(dtype)
    return linear.requires_grad_(False)
