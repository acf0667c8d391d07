"""Calibration samples in shards: the forward passes of a block over each are independent work, done wherever
`spread` does it (`spread.py`).

    samples = n shards, one after another        Σ over the samples = shard 0's Σ + shard 1's Σ + ...

Sums over tokens are rounded in the order in which they are made. So the number of shards, which is a setting, decides
the last bit of a result, and who works them does not: one thread, several devices and a Ray cluster give the same
bytes. A shard is whole batches.

What a worker is sent is the block, its tensors and the shard's activations; what comes back are sums, such as Gram
matrices, and the block's outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from awq_core.calibration.offload import load
from awq_core.calibration.stack import Batch, Function, Keep, Runner, at_once
from awq_core.errors import ConfigError
from awq_core.quantization.spread import Spread, here

R = TypeVar("R")
# Where transformers puts the code that a model folder brings; another machine has none of it.
FOLDER_CODE = "transformers_modules"


def sharded(count: int, spread: Spread = here) -> Runner:
    """A `Runner` that works the batches in `count` shards, or as many as there are batches.

    Raises:
        ConfigError: `count` is no positive number.
    """
    if count < 1:
        raise ConfigError(f"calibration in {count} shards is not possible", hint="--calib-shards 2")
    if count == 1:
        return at_once

    def run(
        function: Function[R], block: nn.Module, batches: Sequence[Batch], keep: Keep, /, *arguments: Any
    ) -> Iterator[R]:
        parts = shards(len(batches), count)
        if spread is here or not can_be_sent(block, batches):
            for part in parts:
                yield function(block, (batches[number] for number in part), _numbered(keep, part), *arguments)
            return
        portable = Portable.of(block)
        works = (Work(function, portable, tuple(sent(batches[n]) for n in part), arguments) for part in parts)
        for part, done in zip(parts, spread(work, works), strict=True):
            for number, out in zip(part, done.outputs, strict=False):  # some functions have none
                keep(number, out)
            yield done.result

    return run


def shards(batches: int, count: int) -> list[range]:
    """The numbers of the batches in each shard: neighbours, as many in one as in another or one more, and no empty
    shard but where there are no batches."""
    count = max(1, min(count, batches))
    ends = [batches * number // count for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Portable:
    """A block as a value: the module without values, and its tensors, in the order of `_tensors`."""

    module: nn.Module
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, block: nn.Module) -> Portable:
        """A block that goes on being used; its tensors are not copied."""
        own = _tensors(block)
        return cls(_exchanged(block, own, [one.to("meta") for one in own]), tuple(one.detach() for one in own))

    def restored(self) -> nn.Module:
        """A block of its own around the tensors."""
        return _exchanged(self.module, _tensors(self.module), self.tensors)


@dataclass(frozen=True, slots=True)
class Work:
    """One shard: `function(block, batches, keep, *arguments)`."""

    function: Callable[..., Any]
    block: Portable
    batches: tuple[Batch, ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """What the function returned, and the outputs that it kept, batch by batch."""

    result: Any
    outputs: tuple[torch.Tensor, ...]


def work(item: Work) -> Done:
    """Work one shard."""
    outputs: dict[int, torch.Tensor] = {}
    result = item.function(item.block.restored(), item.batches, outputs.__setitem__, *item.arguments)
    return Done(result, tuple(outputs[number] for number in sorted(outputs)))


def can_be_sent(block: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether a block can work elsewhere: not where blocks leave values for later ones in a mapping they share, nor
    where its code came with the model folder."""
    if any(type(module).__module__.startswith(FOLDER_CODE) for module in block.modules()):
        return False
    calls = [batches[0].call] if len(batches) else []
    return not any(isinstance(one, MutableMapping) for call in calls for one in (*call.args, *call.kwargs.values()))


def sent(batch: Batch) -> Batch:
    """A batch with all that its block reads, and no more."""
    original = None if batch.original is None else load(batch.original)
    return Batch(replace(batch.call, between=None), load(batch.hidden), original, batch.mask)


def _numbered(keep: Keep, part: range) -> Keep:
    return lambda number, out: keep(part[number], out)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def _exchanged(module: nn.Module, old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> nn.Module:
    """A copy of a module with the tensors `new` in the place of `old`: what `copy.deepcopy` believes to have copied
    already."""
    made = {
        id(one): nn.Parameter(other, requires_grad=False) if isinstance(one, nn.Parameter) else other
        for one, other in zip(old, new, strict=True)
    }
    return copy.deepcopy(module, made)
