"""`awq::linear`: the int4 product of whichever backend, as one operator that torch can trace, export and differentiate.

    y  = x · Wᵀ + bias   awq::linear         x  [tokens, in]  -> [tokens, out]
    dx = dy · W          awq::linear_grad    dy [tokens, out] -> [tokens, in]

    y  = silu(g) · u     awq::gated_linear     g and u in turn are x · Wᵀ + bias
    y  = x · W[e]ᵀ       awq::grouped_linear   a row for each pair of a token and an expert e it was sent to

Weights and biases are frozen, so the gradient is that of the input alone: enough to train adapters (LoRA) on top of
int4 layers. The last two have none. To the compiler each is a single node whose inside it does not see. The
backend is named by its factory, text that an exported program can hold; a program that is loaded again needs this
module imported.
"""

from __future__ import annotations

from typing import Any

import torch

from awq_core import kernels

LIBRARY = torch.library.Library("awq", "DEF")
LIBRARY.define("linear(Tensor x, Tensor[] state, str[] names, str factory, SymInt out, Tensor? bias) -> Tensor")
LIBRARY.define(
    "grouped_linear(Tensor x, Tensor[] state, str[] names, str factory, Tensor choices, SymInt out) -> Tensor"
)
LIBRARY.define("gated_linear(Tensor x, Tensor[] state, str[] names, str factory, SymInt inner, Tensor? bias) -> Tensor")
LIBRARY.define("linear_grad(Tensor dy, Tensor[] state, str[] names, str factory, SymInt inputs) -> Tensor")


def linear(
    x: torch.Tensor,
    state: list[torch.Tensor],
    names: list[str],
    factory: str,
    out: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x `[tokens, in]` times the prepared weight transposed, plus the bias: `[tokens, out]` in the dtype of x.

    Args:
        state, names: values and keys of what the backend's `prepare` returned.
        factory: the `KernelBackend.factory` whose kernel prepared it.
        out: output features.
        bias: `[out]`. The kernel adds it where it can, before it rounds.
    """
    result: torch.Tensor = torch.ops.awq.linear(x, state, names, factory, out, bias)
    return result


def _linear(
    x: torch.Tensor,
    state: list[torch.Tensor],
    names: list[str],
    factory: str,
    out: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    kernel, held = kernels.instance(factory), dict(zip(names, state, strict=True))
    if bias is None:
        return kernel.linear(x, held)
    bias = bias.to(x.dtype)
    if hasattr(kernel, "linear_bias"):
        added: torch.Tensor = kernel.linear_bias(x, held, bias)
        return added
    return kernel.linear(x, held) + bias


def grouped_linear(
    x: torch.Tensor, state: list[torch.Tensor], names: list[str], factory: str, choices: torch.Tensor, out: int
) -> torch.Tensor:
    """x `[T, in]`, or `[T · k, in]`, with the weights of experts `choices` `[T, k]`: `[T · k, out]`, in their order.

    Args:
        state, names: values and keys of what the kernel's `stack` returned.
    """
    result: torch.Tensor = torch.ops.awq.grouped_linear(x, state, names, factory, choices, out)
    return result


def _grouped_linear(
    x: torch.Tensor, state: list[torch.Tensor], names: list[str], factory: str, choices: torch.Tensor, out: int
) -> torch.Tensor:
    kernel = kernels.instance(factory)
    assert isinstance(kernel, kernels.GroupedKernel)
    return kernel.grouped_linear(x, dict(zip(names, state, strict=True)), choices)


def gated_linear(
    x: torch.Tensor,
    state: list[torch.Tensor],
    names: list[str],
    factory: str,
    inner: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(gate) · up, `[tokens, inner]`, of a weight and a bias that hold both in turn.

    Args:
        state, names: values and keys of what the kernel's `interleave` returned.
    """
    result: torch.Tensor = torch.ops.awq.gated_linear(x, state, names, factory, inner, bias)
    return result


def _gated_linear(
    x: torch.Tensor,
    state: list[torch.Tensor],
    names: list[str],
    factory: str,
    inner: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    kernel = kernels.instance(factory)
    assert isinstance(kernel, kernels.GatedKernel)
    return kernel.gated_linear(x, dict(zip(names, state, strict=True)), None if bias is None else bias.to(x.dtype))


def _linear_grad(
    dy: torch.Tensor, state: list[torch.Tensor], names: list[str], factory: str, inputs: int
) -> torch.Tensor:
    kernel, held = kernels.instance(factory), dict(zip(names, state, strict=True))
    if hasattr(kernel, "dequantize"):
        return dy @ kernel.dequantize(held, dy.dtype)
    # Any linear tells its weight: the product with the identity is Wᵀ.
    return dy @ kernel.linear(torch.eye(inputs, dtype=dy.dtype, device=dy.device), held).T


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, ctx.state, ctx.names, ctx.factory, *_ = inputs
    ctx.inputs = x.shape[1]


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    dx = torch.ops.awq.linear_grad(dy, ctx.state, ctx.names, ctx.factory, ctx.inputs)
    return dx, [None] * len(ctx.state), None, None, None, None


LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
LIBRARY.impl("grouped_linear", _grouped_linear, "CompositeExplicitAutograd")
LIBRARY.impl("gated_linear", _gated_linear, "CompositeExplicitAutograd")
LIBRARY.impl("linear_grad", _linear_grad, "CompositeExplicitAutograd")
torch.library.register_fake(
    "awq::linear", lambda x, state, names, factory, out, bias=None: x.new_empty(x.shape[0], out)
)
torch.library.register_fake(
    "awq::grouped_linear",
    lambda x, state, names, factory, choices, out: x.new_empty(choices.shape[0] * choices.shape[1], out),
)
torch.library.register_fake(
    "awq::gated_linear", lambda x, state, names, factory, inner, bias: x.new_empty(x.shape[0], inner)
)
torch.library.register_fake(
    "awq::linear_grad", lambda dy, state, names, factory, inputs: dy.new_empty(dy.shape[0], inputs)
)
torch.library.register_autograd("awq::linear", _backward, setup_context=_remember)
