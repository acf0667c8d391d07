"""`awq::linear`: the int4 product of whichever backend, as one operator that torch can trace, export and differentiate.

    y  = x · Wᵀ          awq::linear         x  [tokens, in]  -> [tokens, out]
    dx = dy · W          awq::linear_grad    dy [tokens, out] -> [tokens, in]

Weights are frozen, so the gradient is that of the input alone: enough to train adapters (LoRA) on top of int4 layers.
To the compiler each is a single node whose inside it does not see. The backend is named by its factory, text that an
exported program can hold; a program that is loaded again needs this module imported.
"""

from __future__ import annotations

from typing import Any

import torch

from awq_core import kernels

LIBRARY = torch.library.Library("awq", "DEF")
LIBRARY.define("linear(Tensor x, Tensor[] state, str[] names, str factory, SymInt out) -> Tensor")
LIBRARY.define("linear_grad(Tensor dy, Tensor[] state, str[] names, str factory, SymInt inputs) -> Tensor")


def linear(x: torch.Tensor, state: list[torch.Tensor], names: list[str], factory: str, out: int) -> torch.Tensor:
    """x `[tokens, in]` times the prepared weight transposed: `[tokens, out]` in the dtype of x.

    Args:
        state, names: values and keys of what the backend's `prepare` returned.
        factory: the `KernelBackend.factory` whose kernel prepared it.
        out: output features.
    """
    result: torch.Tensor = torch.ops.awq.linear(x, state, names, factory, out)
    return result


def _linear(x: torch.Tensor, state: list[torch.Tensor], names: list[str], factory: str, out: int) -> torch.Tensor:
    return kernels.instance(factory).linear(x, dict(zip(names, state, strict=True)))


def _linear_grad(
    dy: torch.Tensor, state: list[torch.Tensor], names: list[str], factory: str, inputs: int
) -> torch.Tensor:
    kernel, held = kernels.instance(factory), dict(zip(names, state, strict=True))
    if hasattr(kernel, "dequantize"):
        return dy @ kernel.dequantize(held, dy.dtype)
    # Any linear tells its weight: the product with the identity is Wᵀ.
    return dy @ kernel.linear(torch.eye(inputs, dtype=dy.dtype, device=dy.device), held).T


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.state, ctx.names, ctx.factory, _ = inputs
    ctx.inputs = x.shape[1]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    dx = torch.ops.awq.linear_grad(dy, ctx.state, ctx.names, ctx.factory, ctx.inputs)
    return dx, [None] * len(ctx.state), None, None, None


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_grad", _linear_grad, "CompositeExplicitAutograd")
torch.library.register_fake("awq::linear", lambda x, state, names, factory, out: x.new_empty(x.shape[0], out))
torch.library.register_fake(
    "awq::linear_grad", lambda dy, state, names, factory, inputs: dy.new_empty(dy.shape[0], inputs)
)
torch.library.register_autograd("awq::linear", _backward, setup_context=_remember)
