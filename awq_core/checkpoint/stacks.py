"""Reading stacked experts as if each were stored alone.

Some checkpoints hold the experts of a layer in one tensor, `experts.gate_up_proj` `[E, 2·I, H]`, though engines expect
quantized ones apart, `experts.<e>.gate_proj.qweight`. A module that replaced such a stack says, in its attribute
`stored`, which piece of which stack each of its parameters is. `unstacked` then shows a checkpoint as if it held the
pieces, and whatever reads it needs not know. A result therefore has each expert under its own name, quantized or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.view import ReaderView, Shown
from awq_core.skeleton import targets


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter that is part of a stack.

    Attributes:
        stack: name of the stack beside the experts ("gate_up_proj").
        expert: its place in the stack.
        first, end, step: which of the expert's outputs.
        turned: whether the stack has inputs first, `[E, in, out]`; stacks on disk may be turned the other way.
    """

    stack: str
    expert: int
    first: int = 0
    end: int | None = None
    step: int = 1
    turned: bool = False

    def shape(self, stack: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the piece, for that of the stack."""
        rows, *rest = reversed(stack[1:]) if self.turned else stack[1:]
        return (len(range(rows)[self.first : self.end : self.step]), *rest)

    def cut(self, expert: torch.Tensor) -> torch.Tensor:
        """The piece, of the expert's share of the stack; in memory of its own."""
        part = (expert.t() if self.turned else expert)[self.first : self.end : self.step]
        return part.clone(memory_format=torch.contiguous_format)


def unstacked(reader: CheckpointReader, model: PreTrainedModel) -> CheckpointReader:
    """`reader`, or a view of it in which the stacks that `model` has taken apart are taken apart too."""
    # name of a stack in the model -> ends of the pieces' names, pieces, shapes of the parameters
    within: dict[str, list[tuple[str, Piece, torch.Size]]] = {}
    for path, module in model.named_modules():
        for name, piece in getattr(module, "stored", {}).items():
            shape = module.get_parameter(name).shape
            within.setdefault(f"{path}.{piece.stack}", []).append((name, piece, shape))
    shown: dict[str, Shown] = {}
    pieces: dict[str, list[str]] = {}  # by their stack on disk
    for target, on_disk in targets(model, reader.names, within):
        if target in within:
            stack = within[target][0][1].stack
            prefix = (on_disk if on_disk.endswith(stack) else target).removesuffix(stack)
            for name, piece, wanted in within[target]:
                shown[prefix + name] = _piece(reader, on_disk, piece, wanted)
                pieces.setdefault(on_disk, []).append(prefix + name)
    names = (one for name in reader.names for one in pieces.get(name, (name,)))
    return ReaderView(reader, names, shown) if shown else reader


def _piece(reader: CheckpointReader, stack: str, piece: Piece, wanted: torch.Size) -> Shown:
    stored = reader.shape(stack)
    piece = _facing(piece, stored, wanted)

    def make(dtype: torch.dtype | None, check_finite: bool) -> torch.Tensor:
        one = (piece.expert, piece.expert + 1)
        return piece.cut(reader.tensor(stack, dtype=dtype, check_finite=check_finite, rows=one)[0])

    return Shown(piece.shape(stored), reader.dtype(stack), make)


def _facing(piece: Piece, stored: tuple[int, ...], wanted: tuple[int, ...]) -> Piece:
    """The piece, turned as the stack on disk is: transformers turns some stacks while loading, told by their shapes."""
    other = replace(piece, turned=not piece.turned)
    turns = len(wanted) == 2 and piece.shape(stored) != tuple(wanted) == other.shape(stored)
    return other if turns else piece
