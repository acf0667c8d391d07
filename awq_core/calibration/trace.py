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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from awq_core.calibration.offload import Offloaded, OffloadFile, load
from awq_core.calibration.stack import Call, StackInputs, as_returned
from awq_core.errors import PlanError

HIDDEN = ("hidden_states", "hidden_state")  # what models call a block's input where they pass it by name
CACHES = ("past_key_values", "past_key_value", "layer_past")
MEMBERS = 3  # of the longest tuple that a block is tried with: hidden states, attention, cache


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
