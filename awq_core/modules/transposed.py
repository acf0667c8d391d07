"""`Conv1D` as linears.

The oldest checkpoints hold a linear's weight as `[in, out]`, and transformers computes x W + b with its `Conv1D`.
Quantizers see `nn.Linear`s, whose weight is `[out, in]`, so a plugin replaces them by `TransposedLinear`. While it is
not quantized its weight is turned whenever it is read or written, and the checkpoint stays as it was. Quantized, it is
a linear like any other: the AWQ format has the inputs first in any case, and engines read it as such.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D


class TransposedLinear(nn.Linear):
    """A linear whose weight, `[out, in]` here, is `[in, out]` on disk."""

    stored_transposed = True


def linear_conv1d(model: nn.Module) -> bool:
    """Replace every `Conv1D` of a model by a linear of the same name, in place.

    Works on the meta device; the new linears keep device, dtype and, where there are any, values.

    Returns:
        Whether anything was replaced.
    """
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Conv1D)]
    for path, module in found:
        linear = TransposedLinear(module.nx, module.nf, device="meta").train(module.training)
        linear.weight = nn.Parameter(module.weight.data.t().contiguous(), requires_grad=False)
        linear.bias = nn.Parameter(module.bias.data, requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return bool(found)
