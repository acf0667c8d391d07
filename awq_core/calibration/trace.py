"""The inputs of every block of a stack, recorded from one pass of the model through stubs.

While recording, each block's `forward` is a stub that notes its arguments and hands its input on unchanged, so the
model's own code builds the embeddings, masks and rotary tables (per block, where they differ from block to block)
and no block weight is needed. The pass stops after the last block.

Most models hand one block's output straight to the next. Where the model adds something in between (image features
added after the early blocks), the stub sees a tensor other than the one it returned, and the difference is kept:

    input of block i = output of block i-1 + between_i

Inputs and differences are kept in memory or in a file (`awq_core.calibration.offload`). Masks and rotary tables stay in
memory: a model makes them once a batch, for all of its blocks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from awq_core.calibration.offload import Offloaded, OffloadFile, load
from awq_core.errors import PlanError

HIDDEN = ("hidden_states", "hidden_state")  # what models call a block's input where they pass it by name
CACHES = ("past_key_values", "past_key_value", "layer_past")
MEMBERS = 3  # of the longest tuple that a block is tried with: hidden states, attention, cache


@dataclass(slots=True)
class Call:
    """Arguments of one block for one batch, without the hidden states; `keyword` is the name those are passed by, if
    any. `apart` has the original model's version of mappings among them, in which blocks leave keys and values for
    later ones."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str
    between: torch.Tensor | Offloaded | None = None
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

    hidden: list[torch.Tensor | Offloaded] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    masks: list[torch.Tensor | None] = field(default_factory=list)
    feeds: bool = False
    members: int = 0
    original: list[torch.Tensor | Offloaded] = field(default_factory=list)

    def fork(self) -> None:
        """Keep two versions of the samples from here on: `advance` changes one, `advance_original` the other."""
        self.original = [kept.file.keep(kept.load()) if isinstance(kept, Offloaded) else kept for kept in self.hidden]
        copies: dict[int, Any] = {}  # one for all blocks that are given the same mapping
        for call in (call for calls in self.calls for call in calls):
            shared = {name: value for name, value in call.kwargs.items() if isinstance(value, MutableMapping)}
            call.apart = {name: copies.setdefault(id(value), copy.copy(value)) for name, value in shared.items()}

    def advance_original(self, index: int, block: nn.Module) -> None:
        """Replace the original inputs of block `index` by those of the next; `advance` comes after it."""
        with torch.no_grad():
            for batch, call in enumerate(self.calls[index]):
                self.keep_original(batch, index, call.run_original(block, load(self.original[batch])))

    def keep_original(self, batch: int, index: int, out: torch.Tensor) -> None:
        """Keep what the original block `index` gives for a batch; after the last block nothing reads it."""
        if index + 1 < len(self.calls):
            self._keep(self.original, batch, self.following(batch, index, out))

    def advance(self, index: int, block: nn.Module) -> None:
        """Replace the inputs of block `index` by those of the next block, of the last by its outputs if it `feeds`."""
        last = index + 1 == len(self.calls)
        calls, self.calls[index] = self.calls[index], []
        if last and not self.feeds:
            return
        with torch.no_grad():
            for batch, call in enumerate(calls):
                out = call.returned(block, load(self.hidden[batch]))
                self.members = members_of(out)
                self._keep(self.hidden, batch, self.following(batch, index, out[0] if self.members else out))

    def following(self, batch: int, index: int, out: torch.Tensor) -> torch.Tensor:
        """The input of the block after `index`, which gave `out`."""
        last = index + 1 == len(self.calls)
        between = None if last else self.calls[index + 1][batch].between
        return (out if between is None else out + load(between)).contiguous()

    @staticmethod
    def _keep(where: list[torch.Tensor | Offloaded], batch: int, hidden: torch.Tensor) -> None:
        kept = where[batch]
        if isinstance(kept, Offloaded):
            kept.store(hidden)
        else:
            where[batch] = hidden


def members_of(out: Any) -> int:
    """How many members the tuple has that a block returned; 0 where it is no tuple."""
    return len(out) if isinstance(out, tuple) else 0


def as_returned(hidden: torch.Tensor, count: int) -> Any:
    """Hidden states as a block returns them: alone, or first in a tuple of `count`, which some models unpack."""
    return (hidden, *[None] * (count - 1)) if count else hidden


class _StackDone(Exception):
    pass


class _TupleExpected(Exception):
    pass


def record(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    device: torch.device | str = "cpu",
    offload: OffloadFile | None = None,
) -> StackInputs:
    """Run `model` on each batch with stubs for `blocks`.

    Args:
        batches: keyword arguments of the model; "attention_mask", where present, also says which tokens are padding.
        offload: where inputs are kept instead of in memory. What it held before is forgotten.

    Raises:
        PlanError: the model calls its blocks in a way that cannot be followed.
        OutputError: the disk cannot take the inputs.
    """
    for count in range(MEMBERS):  # what a block returns is not known before it has run
        try:
            return _record(model, blocks, batches, members=count, device=device, offload=offload)
        except _TupleExpected:
            continue
        except ValueError as error:
            if "unpack" not in str(error):
                raise
    return _record(model, blocks, batches, members=MEMBERS, device=device, offload=offload)


def _record(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[dict[str, torch.Tensor]],
    *,
    members: int,
    device: torch.device | str,
    offload: OffloadFile | None,
) -> StackInputs:
    inputs = StackInputs(calls=[[] for _ in blocks])
    returned: list[torch.Tensor] = []
    if offload:
        offload.clear()

    def keep(tensor: torch.Tensor) -> torch.Tensor | Offloaded:
        return offload.keep(tensor) if offload else tensor.contiguous()

    def stub(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            keyword = "" if args else next((name for name in HIDDEN if name in kwargs), "")
            if not args and not keyword:
                raise PlanError(
                    f"block {index} is called with {', '.join(kwargs) or 'nothing'}, not with its hidden states first",
                    hint=f"call blocks as block({HIDDEN[0]}, ...) in the model's forward",
                )
            hidden = kwargs.pop(keyword) if keyword else args[0]
            # Every batch is a fresh prompt; a cache the model made in spite of use_cache=False would grow with each.
            kwargs = {name: None if name in CACHES else value for name, value in kwargs.items()}
            call = Call(args[1:], kwargs, keyword)
            if index == 0:
                inputs.hidden.append(keep(hidden))
            elif hidden is not returned[-1]:
                if hidden.ndim < returned[-1].ndim:
                    # The model took the first member of what the block returned: blocks return tuples here.
                    raise _TupleExpected
                difference = hidden - returned[-1]
                call.between = keep(difference) if torch.any(difference) else None
            returned[:] = [hidden]
            inputs.calls[index].append(call)
            if index + 1 == len(blocks):
                raise _StackDone
            return as_returned(hidden, members)

        return forward

    with torch.no_grad(), _replaced_forwards(blocks, [stub(index) for index in range(len(blocks))]):
        for batch in batches:
            batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
            mask = batch.get("attention_mask")
            inputs.masks.append(mask.bool() if mask is not None and mask.ndim == 2 else None)
            try:
                model(**batch, use_cache=False)
            except _StackDone:
                continue
    return inputs


def replay(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: StackInputs,
    batches: Sequence[dict[str, torch.Tensor]],
    reader: nn.Module,
    *,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Run `model` on each batch from the end of a stack to the call of `reader`, which comes after it.

    Args:
        blocks: of the stack, all of them; in their place are stubs, which give what `inputs` has kept of the last.
        inputs: what `record` gave for these batches, advanced through every block with `feeds` set.

    Yields:
        What `reader` is called with, and the mask of its tokens, batch by batch.

    Raises:
        PlanError: the model does not call `reader`.
    """
    seen: list[torch.Tensor] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        seen.append((*args, *kwargs.values())[0])
        raise _StackDone

    for batch, kept, mask in zip(batches, inputs.hidden, inputs.masks, strict=True):
        with torch.no_grad(), _replaced_forwards([reader], [stop]), suppress(_StackDone):
            finish(model, blocks, batch, load(kept), members=inputs.members, device=device)
        if not seen:
            raise PlanError(f"{type(model).__name__} does not call its output head", hint="leave out --lm-head")
        yield seen.pop(), mask


def finish(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batch: dict[str, torch.Tensor],
    hidden: torch.Tensor,
    *,
    members: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The logits of a batch, `[batch, tokens, vocabulary]`, if the last block of a stack gives `hidden`. Gradients flow
    back to it.

    Args:
        blocks: of the stack, all of them; in their place are stubs.
        members: of the tuple that a block returns, 0 for none.
    """

    def stub(*args: Any, **kwargs: Any) -> Any:
        return as_returned(hidden, members)

    batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
    with _replaced_forwards(blocks, [stub for _ in blocks]):
        logits: torch.Tensor = model(**batch, use_cache=False).logits
    return logits


@contextmanager
def _replaced_forwards(blocks: Sequence[nn.Module], stubs: Sequence[Callable[..., Any]]) -> Iterator[None]:
    for block, stub in zip(blocks, stubs, strict=True):
        block.forward = stub
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own method shows again
