"""What a stack of blocks is fed: the samples before the block that is worked next, and the arguments of every call.

    input of block i = output of block i-1 + between_i

Forward passes go batch by batch, and batches do not know of one another. So what is done with them is a function of a
block and some batches, and a `Runner` decides who calls it on which of them: `at_once` on all, in this thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import nn

from awq_core.calibration.offload import Offloaded, load

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Kept = torch.Tensor | Offloaded
# Takes what a block gave for a batch, by the batch's number.
Keep = Callable[[int, torch.Tensor], None]


@dataclass(slots=True)
class Call:
    """Arguments of one block for one batch, without the hidden states; `keyword` is the name those are passed by, if
    any. `apart` has the original model's version of mappings among them, in which blocks leave keys and values for
    later ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str
    between: Kept | None = None
    apart: dict[str, Any] = field(default_factory=dict)

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output for `hidden` (`[batch, tokens, hidden]`)."""
        out = self.returned(block, hidden)
        return out[0] if isinstance(out, tuple) else out

    def run_original(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """`run` for the original model's version of the samples."""
        return replace(self, kwargs={**self.kwargs, **self.apart}).run(block, hidden)

    def returned(self, block: nn.Module, hidden: torch.Tensor) -> Any:
        """All that the block returns: its output, or a tuple with that first."""
        if self.keyword:
            return block(*self.args, **{self.keyword: hidden}, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch before a block.

    Attributes:
        hidden: the block's input, `[batch, tokens, hidden]`, or where it is kept.
        original: the same as the original model gives it; None unless the samples were forked.
        mask: True for tokens that are no padding, `[batch, tokens]`, or None.
    """

    call: Call
    hidden: Kept
    original: Kept | None
    mask: torch.Tensor | None


class Function(Protocol[R_co]):
    """What is done with some batches: `keep(number, out)` is told outputs, by the number among these batches. It is a
    function of a module, and changes neither block nor batches."""

    def __call__(self, block: nn.Module, batches: Iterable[Batch], keep: Keep, /, *arguments: Any) -> R_co: ...


class Runner(Protocol):
    """Calls a function on batches, part by part; yields what it returns of each part, in order. `keep` is told outputs
    by the number among all batches."""

    def __call__(
        self, function: Function[R], block: nn.Module, batches: Sequence[Batch], keep: Keep, /, *arguments: Any
    ) -> Iterator[R]: ...


def at_once(
    function: Function[R], block: nn.Module, batches: Sequence[Batch], keep: Keep, /, *arguments: Any
) -> Iterator[R]:
    """The `Runner` with one part, in this thread."""
    yield function(block, batches, keep, *arguments)


def nowhere(number: int, out: torch.Tensor) -> None:
    """The `Keep` of functions that give no outputs."""


class _Batches(Sequence[Batch]):
    """The batches before a block, each made when it is asked for: those before it may have been replaced by then."""

    def __init__(self, inputs: StackInputs, calls: list[Call]) -> None:
        self.inputs, self.calls = inputs, calls

    def __len__(self) -> int:
        return len(self.calls)

    @overload
    def __getitem__(self, number: int) -> Batch: ...
    @overload
    def __getitem__(self, number: slice) -> list[Batch]: ...
    def __getitem__(self, number: int | slice) -> Batch | list[Batch]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        call, inputs = self.calls[number], self.inputs  # past the end: the IndexError that ends a loop
        original = inputs.original[number] if inputs.original else None
        return Batch(call, inputs.hidden[number], original, inputs.masks[number])


@dataclass(slots=True)
class StackInputs:
    """What a stack of blocks is fed.

    Attributes:
        hidden: per batch, the input of the block that is worked next, or where it is kept.
        calls: `[block][batch]`.
        masks: per batch, True for tokens that are no padding, or None.
        feeds: whether something reads what the last block gives, which is then kept in `hidden`, for `replay`.
        members: of the tuple that the last block returned it in; 0 where it was no tuple.
        original: per batch, the input that the original model gives the block that is worked next; empty unless `fork`
            was called.
    """

    hidden: list[Kept] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    masks: list[torch.Tensor | None] = field(default_factory=list)
    feeds: bool = False
    members: int = 0
    original: list[Kept] = field(default_factory=list)

    def fork(self) -> None:
        """Keep two versions of the samples from here on: `advance` changes one, `advance_original` the other."""
        self.original = [kept.file.keep(kept.load()) if isinstance(kept, Offloaded) else kept for kept in self.hidden]
        copies: dict[int, Any] = {}  # one for all blocks that are given the same mapping
        for call in (call for calls in self.calls for call in calls):
            shared = {name: value for name, value in call.kwargs.items() if isinstance(value, MutableMapping)}
            call.apart = {name: copies.setdefault(id(value), copy.copy(value)) for name, value in shared.items()}

    def batches(self, index: int) -> Sequence[Batch]:
        """The batches before block `index`, which is worked next."""
        return _Batches(self, self.calls[index])

    def advance_original(self, index: int, block: nn.Module, run: Runner = at_once) -> None:
        """Replace the original inputs of block `index` by those of the next; `advance` comes after it."""
        for _ in run(_forward_original, block, self.batches(index), partial(self.keep_original, index)):
            pass

    def keep_original(self, index: int, batch: int, out: torch.Tensor) -> None:
        """Keep what the original block `index` gives for a batch; after the last block nothing reads it."""
        if index + 1 < len(self.calls):
            self._keep(self.original, batch, self.following(batch, index, out))

    def advance(self, index: int, block: nn.Module, run: Runner = at_once) -> None:
        """Replace the inputs of block `index` by those of the next block, of the last by its outputs if it `feeds`."""
        batches, self.calls[index] = self.batches(index), []
        if index + 1 == len(self.calls) and not self.feeds:
            return

        def keep(batch: int, out: torch.Tensor) -> None:
            self._keep(self.hidden, batch, self.following(batch, index, out))

        for self.members in run(_forward, block, batches, keep):
            pass

    def following(self, batch: int, index: int, out: torch.Tensor) -> torch.Tensor:
        """The input of the block after `index`, which gave `out`."""
        last = index + 1 == len(self.calls)
        between = None if last else self.calls[index + 1][batch].between
        return (out if between is None else out + load(between)).contiguous()

    @staticmethod
    def _keep(where: list[Kept], batch: int, hidden: torch.Tensor) -> None:
        kept = where[batch]
        if isinstance(kept, Offloaded):
            kept.store(hidden)
        else:
            where[batch] = hidden


@torch.no_grad()
def _forward(block: nn.Module, batches: Iterable[Batch], keep: Keep, /) -> int:
    """Outputs; returns how many members the tuple has that a block returns, 0 where it is no tuple."""
    members = 0
    for number, batch in enumerate(batches):
        out = batch.call.returned(block, load(batch.hidden))
        members = members_of(out)
        keep(number, out[0] if members else out)
    return members


@torch.no_grad()
def _forward_original(block: nn.Module, batches: Iterable[Batch], keep: Keep, /) -> None:
    """Outputs of the original model's version of the samples."""
    for number, batch in enumerate(batches):
        assert batch.original is not None
        keep(number, batch.call.run_original(block, load(batch.original)))


def members_of(out: Any) -> int:
    """How many members the tuple has that a block returned; 0 where it is no tuple."""
    return len(out) if isinstance(out, tuple) else 0


def as_returned(hidden: torch.Tensor, count: int) -> Any:
    """Hidden states as a block returns them: alone, or first in a tuple of `count`, which some models unpack."""
    return (hidden, *[None] * (count - 1)) if count else hidden
