"""The experts of a mixture as three products over all of them, instead of a loop over those that were chosen.

    y[t · k + i] = x[t] · W[choices[t, i]]ᵀ          `awq::grouped_linear`

The loop asks the GPU which expert has tokens and waits for the answer, once for each expert of each block; this asks
nothing, so a decode step can be captured as a graph. It needs a kernel that has `stack` and `grouped_linear`; with any
other, experts run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from awq_core import kernels
from awq_core.kernels import operator
from awq_core.modules import UnstackedExperts
from awq_core.runtime.linear import QuantLinear


class GroupedLinear(nn.Module):
    """One of the linears of all experts. The experts' own become views of it, so no weight is held twice."""

    def __init__(self, linears: Sequence[QuantLinear]) -> None:
        super().__init__()
        first = linears[0]
        self.in_features, self.out_features = first.in_features, first.out_features
        self.weight_dtype = first.weight_dtype
        self._factory, self._state_names = first.factory, first.state_names
        kernel = kernels.instance(self._factory)
        assert isinstance(kernel, kernels.GroupedKernel)
        state = kernel.stack([one.state() for one in linears])
        for name, tensor in state.items():
            self.register_buffer(name, tensor, persistent=False)
        for expert, one in enumerate(linears):
            for name, tensor in kernel.unstack(state, expert).items():
                setattr(one, name, tensor)

    def forward(self, x: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
        """x [T, in], or [T · k, in], for choices [T, k] -> [T · k, out], in the order of the choices."""
        state = [getattr(self, name) for name in self._state_names]
        rows = x.to(self.weight_dtype)
        out = operator.grouped_linear(rows, state, self._state_names, self._factory, choices, self.out_features)
        return out.to(x.dtype)


def group_experts(model: nn.Module) -> int:
    """Let every `UnstackedExperts` whose kernel can do so run its experts together; returns how many do."""
    count = 0
    for module in list(model.modules()):
        if isinstance(module, UnstackedExperts) and module.num_experts and not module.together:
            columns = [
                [module.get_submodule(f"{expert}.{name}") for expert in range(module.num_experts)]
                for name in module.names
            ]
            if all(_alike(column) for column in columns):
                # One at a time: what is stacked is held twice until the experts' own are let go.
                module.together = nn.ModuleList([GroupedLinear(column) for column in columns])  # type: ignore[arg-type]
                count += 1
    return count


def _alike(linears: Sequence[nn.Module]) -> bool:
    """Whether all are quantized, without bias, alike in shape, group size and device, and of a kernel that groups."""
    kinds = set()
    for one in linears:
        if not isinstance(one, QuantLinear) or one.bias is not None:
            return False
        tensors = tuple((name, tensor.shape, tensor.dtype, tensor.device) for name, tensor in one.state().items())
        kinds.add((one.factory, one.weight_dtype, tensors))
    return len(kinds) == 1 and isinstance(kernels.instance(next(iter(kinds))[0]), kernels.GroupedKernel)
