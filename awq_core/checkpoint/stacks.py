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


class UnstackedReader(CheckpointReader):
    """A reader that shows `pieces`, name -> (name of its stack on disk, piece), in the place of their stacks."""

    def __init__(self, reader: CheckpointReader, pieces: dict[str, tuple[str, Piece]]) -> None:
        self.folder, self.total_bytes = reader.folder, reader.total_bytes
        self._reader, self._pieces = reader, pieces
        within: dict[str, list[str]] = {}
        for name, (stack, _) in pieces.items():
            within.setdefault(stack, []).append(name)
        self.names = tuple(shown for name in reader.names for shown in within.get(name, (name,)))
        self._shown = frozenset(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._shown

    def close(self) -> None:
        self._reader.close()

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._pieces:
            return self._reader.shape(name)
        stack, piece = self._pieces[name]
        return piece.shape(self._reader.shape(stack))

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.dtype(self._pieces[name][0] if name in self._pieces else name)

    def nbytes(self, name: str) -> int:
        if name not in self._pieces:
            return self._reader.nbytes(name)
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def tensor(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        check_finite: bool = True,
        rows: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        if name not in self._pieces:
            return self._reader.tensor(name, device=device, dtype=dtype, check_finite=check_finite, rows=rows)
        stack, piece = self._pieces[name]
        one = (piece.expert, piece.expert + 1)
        whole = piece.cut(self._reader.tensor(stack, dtype=dtype, check_finite=check_finite, rows=one)[0])
        return (whole[slice(*rows)] if rows else whole).to(device)

    def read_into(self, name: str, out: torch.Tensor, *, check_finite: bool = True) -> torch.Tensor:
        if name not in self._pieces:
            return self._reader.read_into(name, out, check_finite=check_finite)
        return out.copy_(self.tensor(name, dtype=out.dtype, check_finite=check_finite))


def unstacked(reader: CheckpointReader, model: PreTrainedModel) -> CheckpointReader:
    """`reader`, or a view of it in which the stacks that `model` has taken apart are taken apart too."""
    # name of a stack in the model -> ends of the pieces' names, pieces, shapes of the parameters
    within: dict[str, list[tuple[str, Piece, torch.Size]]] = {}
    for path, module in model.named_modules():
        for name, piece in getattr(module, "stored", {}).items():
            shape = module.get_parameter(name).shape
            within.setdefault(f"{path}.{piece.stack}", []).append((name, piece, shape))
    pieces: dict[str, tuple[str, Piece]] = {}
    for target, on_disk in targets(model, reader.names, within):
        if target in within:
            stack = within[target][0][1].stack
            prefix = (on_disk if on_disk.endswith(stack) else target).removesuffix(stack)
            stored = reader.shape(on_disk)
            pieces.update(
                (prefix + name, (on_disk, _facing(piece, stored, shape))) for name, piece, shape in within[target]
            )
    return UnstackedReader(reader, pieces) if pieces else reader


def _facing(piece: Piece, stored: tuple[int, ...], wanted: tuple[int, ...]) -> Piece:
    """The piece, turned as the stack on disk is: transformers turns some stacks while loading, told by their shapes."""
    other = replace(piece, turned=not piece.turned)
    turns = len(wanted) == 2 and piece.shape(stored) != tuple(wanted) == other.shape(stored)
    return other if turns else piece
