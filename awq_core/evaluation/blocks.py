"""How much of a block's output each quantized model gets wrong, given the original's input.

Per linear, two folders cannot be compared: activation-aware scales are folded into weights and norms, so that a linear
of A and the same linear of B compute in different coordinates. What enters and leaves a block is in none. With x the
input of a block of the original model, y = f(x) its output and f_A the same block of A, over tokens t,

    error = mean_t ‖f_A(x)_t - y_t‖ / ‖y_t‖

Errors do not add up from block to block, since every block gets the original's input: the number is the block's own.
It is a mean of ratios because many models have a few tokens a thousand times longer than the rest, and a ratio of sums
would be about those only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from awq_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BlockError:
    """Relative output error of one block of A and of B; `name` is its path in the model."""

    name: str
    a: float
    b: float


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the members of the outermost module lists: what models repeat, and what plugins call blocks."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(block + ".") for block in found)
        if isinstance(module, nn.ModuleList) and not inside:
            members = [name for name, child in module.named_children() if not isinstance(child, nn.ModuleList)]
            found += [f"{path}.{name}" for name in members]
    return found


class BlockErrors:
    """Adds up the errors of every block while the original model runs."""

    def __init__(self, original: nn.Module, a: nn.Module, b: nn.Module) -> None:
        self.original = original
        self.candidates = (a, b)
        self.dtypes = [next(model.parameters()).dtype for model in (original, a, b)]
        self.busy = False
        self.sums: dict[str, list[float]] = {}
        self.tokens: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is entered, every run of the original is measured; it costs a run of A and one of B.

        Raises:
            ConfigError: A or B has no such block.
        """
        handles = []
        try:
            for path in block_paths(self.original):
                blocks = [_block(candidate, path) for candidate in self.candidates]
                hook = self._hook(path, blocks)
                block = self.original.get_submodule(path)
                handles.append(block.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def results(self) -> tuple[BlockError, ...]:
        """The blocks that ran, in order; of a vision tower, for one, text runs none."""
        return tuple(
            BlockError(path, a / self.tokens[path], b / self.tokens[path]) for path, (a, b) in self.sums.items()
        )

    def _hook(self, path: str, blocks: Sequence[nn.Module]) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.busy:  # A or B is the original itself, and this is its run as A or B
                return
            self.busy = True
            right = _states(output)
            sums = self.sums.setdefault(path, [0.0, 0.0])
            for number, block in enumerate(blocks):
                change = (self.dtypes[0], self.dtypes[number + 1])
                found = _states(block(*_cast(args, *change), **_cast(kwargs, *change)))
                away = (found.float() - right.float()).norm(dim=-1)
                sums[number] += float((away / right.float().norm(dim=-1).clamp_min(1e-30)).double().sum())
            self.busy = False
            self.tokens[path] = self.tokens.get(path, 0) + right.shape[:-1].numel()

        return measure


def _block(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(
            f"the original has a block {path}, a quantized model has not", hint="--reference is what both were made of"
        ) from error


def _states(output: Any) -> torch.Tensor:
    """Hidden states `[..., width]`: a block returns them alone or first."""
    states: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return states


def _cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """`value` with the tensors of dtype `old` in it as `new`: a folder may be saved in another dtype than the original.

    Others, such as fp32 cosines of a bf16 model, stay as they are.
    """
    if old == new:
        return value
    if isinstance(value, torch.Tensor):
        return value.to(new) if value.dtype == old else value
    if type(value) in (tuple, list):
        return type(value)(_cast(one, old, new) for one in value)
    return {key: _cast(one, old, new) for key, one in value.items()} if type(value) is dict else value
