"""A checkpoint shown as if it held other tensors: pieces of its own, or what several of them stand for.

Whatever reads it needs not know. A tensor that is shown is made anew each time it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from awq_core.checkpoint.reader import CheckpointReader


@dataclass(frozen=True, slots=True)
class Shown:
    """A tensor that is not on disk as it is shown.

    Attributes:
        dtype: where none is asked for.
        make: (dtype or None, check_finite) -> the tensor on the CPU, contiguous, in memory of its own.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[torch.dtype | None, bool], torch.Tensor]


class ReaderView(CheckpointReader):
    """A reader of `names`, of which those in `shown` are made and the others are `reader`'s."""

    def __init__(self, reader: CheckpointReader, names: Iterable[str], shown: Mapping[str, Shown]) -> None:
        self.folder, self.total_bytes, self.names = reader.folder, reader.total_bytes, tuple(names)
        self._reader, self._shown, self._known = reader, shown, frozenset(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def close(self) -> None:
        self._reader.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shown[name].shape if name in self._shown else self._reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._shown[name].dtype if name in self._shown else self._reader.dtype(name)

    def nbytes(self, name: str) -> int:
        if name not in self._shown:
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
        if name not in self._shown:
            return self._reader.tensor(name, device=device, dtype=dtype, check_finite=check_finite, rows=rows)
        whole = self._shown[name].make(dtype, check_finite)
        return (whole[slice(*rows)] if rows else whole).to(device)

    def read_into(self, name: str, out: torch.Tensor, *, check_finite: bool = True) -> torch.Tensor:
        if name not in self._shown:
            return self._reader.read_into(name, out, check_finite=check_finite)
        return out.copy_(self.tensor(name, dtype=out.dtype, check_finite=check_finite))
