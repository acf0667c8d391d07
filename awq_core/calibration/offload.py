"""Activations on disk instead of in memory, for calibrations that are larger than it.

What is kept between two blocks is `samples · seq_len · hidden` numbers: half a GiB for 128 windows of 512 tokens, 4096
wide in bf16, and 8 GiB for 2048 windows. All of it lives in one file, and only the batch that is worked is in memory:

    write      a range of the file is reserved, then the tensor's bytes are written to it
    read       the range is mapped, copy-on-write, as the tensor's memory, and unmapped with the tensor

The file has no name: it is unlinked as soon as it is open, so the system frees it when the program ends, however it
ends. The bytes are those of the tensors, so results are the same with and without.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from awq_core.errors import OutputError

# Ranges begin where the system can map them.
ALIGNMENT = mmap.ALLOCATIONGRANULARITY
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(slots=True)
class Offloaded:
    """A tensor in the file: where its bytes begin, how many have room there, and what they mean."""

    file: OffloadFile
    offset: int
    room: int
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    def load(self) -> torch.Tensor:
        """The tensor, on its device. It may be written to: the file does not change."""
        count = self.shape.numel()
        if not count:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        mapped = self.file.mapped(self.offset, count * self.dtype.itemsize)
        return torch.frombuffer(mapped, dtype=self.dtype, count=count).view(self.shape).to(self.device)

    def store(self, tensor: torch.Tensor) -> None:
        """Become `tensor`, of any shape and dtype; in the same place where it fits."""
        if tensor.nbytes > self.room:
            self.offset, self.room = self.file.reserve(tensor.nbytes)
        self.dtype, self.shape, self.device = tensor.dtype, tensor.shape, tensor.device
        if tensor.nbytes:
            content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            self.file.write(self.offset, memoryview(content))


class OffloadFile:
    """A file without a name in a folder.

    Raises:
        OutputError: the folder is missing or not writable; in every method, the disk is full or fails.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise OutputError(f"--offload {self.folder}: no such folder", hint="make it, or choose another")
        with self._errors():
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        self._end = 0

    def keep(self, tensor: torch.Tensor) -> Offloaded:
        """Put a tensor into the file."""
        kept = Offloaded(self, 0, 0, tensor.dtype, tensor.shape, tensor.device)
        kept.store(tensor)
        return kept

    def clear(self) -> None:
        """Forget every tensor, and give the disk its space back."""
        with self._errors():
            self._file.truncate(0)
        self._end = 0

    def close(self) -> None:
        """Forget every tensor and the file."""
        self._file.close()

    def reserve(self, size: int) -> tuple[int, int]:
        """(offset, room) of a new range of at least `size` bytes, for which the disk has space."""
        offset, room = self._end, -(-size // ALIGNMENT) * ALIGNMENT
        with self._errors():
            try:
                os.posix_fallocate(self._file.fileno(), offset, room)
            except AttributeError:  # not on macOS and Windows
                self._file.truncate(offset + room)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self._file.truncate(offset + room)  # a file system that cannot: writing will tell
        self._end += room
        return offset, room

    def write(self, offset: int, content: memoryview) -> None:
        """Write all of `content` at `offset`."""
        with self._errors():
            self._file.seek(offset)
            while content:
                content = content[self._file.write(content) :]  # at most 2 GiB go at once

    def mapped(self, offset: int, size: int) -> mmap.mmap:
        """A private view of a range, in memory for as long as something refers to it."""
        with self._errors():
            return mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                free = shutil.disk_usage(self.folder).free / 2**20
                raise OutputError(
                    f"disk full writing activations to {self.folder}: {free:.0f} MiB free",
                    hint="free space there, give --offload another folder, or calibrate on fewer --samples",
                ) from error
            why = error.strerror or str(error)
            raise OutputError(
                f"cannot keep activations in {self.folder}: {why}", hint="give --offload another folder"
            ) from error


def load(kept: torch.Tensor | Offloaded) -> torch.Tensor:
    """The tensor, wherever it was kept."""
    return kept.load() if isinstance(kept, Offloaded) else kept


@contextmanager
def offloading(folder: str | os.PathLike[str] | None) -> Iterator[OffloadFile | None]:
    """A file in `folder` for as long as the context lasts; None where there is no folder."""
    if folder is None:
        yield None
        return
    file = OffloadFile(folder)
    try:
        yield file
    finally:
        file.close()
