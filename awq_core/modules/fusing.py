"""What the factories of fused blocks share: how they decline, and how they know the code they stand in for.

A factory is called `factory(module, merged, sizes)` and returns what takes the module's place, often the module itself:

    module    the real one of a loaded model, whose parts are not yet kernels' linears
    merged    one linear in place of the parts, which writes their outputs side by side; None where there are no parts
    sizes     path of each part, relative to the module -> its output features, in the order of `merged`

It runs once a block, changes nothing before it is sure, and raises `NotFusedError` where it cannot be exact. Where a
factory replaces a `forward`, that must be one it knows, statement by statement: another version of transformers may
have changed it, and then the module stays as it is.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from awq_core.kernels import blocks

M = TypeVar("M", bound=nn.Module)


class NotFusedError(Exception):
    """Why a module stays as it is, in a few words; they end up in the one line that `load(fuse=True)` prints."""


class _Plain(ast.NodeTransformer):
    """Drops annotations and sorts named arguments: they differ between releases and families, and compute nothing."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.keywords.sort(key=lambda one: (one.arg is None, one.arg))
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return node
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


@functools.cache
def statements(function: Callable[..., Any]) -> str:
    """The body of a function as canonical text, one statement a line, without docstring, comments and annotations;
    empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return ""
    body = definition.body[1:] if ast.get_docstring(definition) is not None else definition.body
    return "\n".join(ast.unparse(_Plain().visit(one)) for one in body)


def canonical(text: str) -> str:
    """Code in the form of `statements`."""
    return "\n".join(ast.unparse(_Plain().visit(one)) for one in ast.parse(text).body)


def require_code(owner: str, code: str, *known: str) -> None:
    """Decline unless `code`, from `statements`, is one of the texts.

    Raises:
        NotFusedError: it is another; `owner` says whose.
    """
    if code not in [canonical(one) for one in known]:
        raise NotFusedError(f"{owner} is not the code this replaces")


def forward_of(module: nn.Module) -> str:
    """The statements of a module's `forward`; empty where the object has one of its own, as accelerate gives it."""
    return "" if "forward" in vars(module) else statements(type(module).forward)


def accelerated(tensor: torch.Tensor) -> bool:
    """Whether the operations of `kernels.blocks` are Triton's for tensors like this one."""
    return blocks.on_triton(tensor)


def activations(module: nn.Module) -> list[torch.Tensor]:
    """An empty tensor of the device and dtype of the module's activations; none where it has no quantized linear."""
    for one in module.modules():
        dtype, state = getattr(one, "weight_dtype", None), next(one.buffers(), None)
        if dtype is not None and state is not None:
            return [torch.empty(0, dtype=dtype, device=state.device)]
    return []


def require_kernels(module: nn.Module) -> None:
    """Decline where the operations of `kernels.blocks` would run in plain torch: transformers' own do as well.

    Raises:
        NotFusedError: the module's device or dtype is not Triton's.
    """
    if not any(accelerated(one) for one in activations(module)):
        raise NotFusedError("no Triton kernels here")


def specialise(module: M, mixin: type) -> M:
    """Give one object a `forward` of its own, with the class's as `super().forward`; it stays an instance of its class,
    so whatever looks for that (recording of attentions, placement of layers) still finds it."""
    cls: Any = type(module)
    module.__class__ = _subclass(cls, mixin)
    return module


@functools.cache
def _subclass(cls: Any, mixin: Any) -> Any:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": mixin.__doc__})
