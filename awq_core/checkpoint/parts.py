"""Tensors into part files of bounded size, as they arrive.

A part is cut in the order of arrival, before it would grow beyond the limit, so that one part is all that is held in
memory. Each file appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from safetensors.torch import save_file

from awq_core.checkpoint.assemble import METADATA
from awq_core.checkpoint.disk import sync
from awq_core.checkpoint.journal import CALLER, Part
from awq_core.checkpoint.partial import PartialFolder
from awq_core.errors import OutputError


class PartWriter:
    """Writes the parts of one run into the `parts` of its partial folder.

    Args:
        limit: bytes of tensors in a part, and about the most held in memory; a larger tensor has a part of its own.

    Attributes:
        open: parts written since the caller last emptied this list.
        names: of all tensors taken.
        total_bytes: size of all tensors taken.
    """

    def __init__(self, partial: PartialFolder, limit: int) -> None:
        self.open: list[Part] = []
        self.total_bytes = 0
        self._partial, self._limit = partial, limit
        self.names: set[str] = set()
        self._count = 0  # of parts, which numbers them
        self._buffer: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()  # addresses of the memory in the buffer
        self._buffered = 0

    def go_on(self, parts: Iterable[Part]) -> None:
        """Count these parts of an earlier run as written."""
        for part in parts:
            self._count += 1
            self.names.update(part.names)
            self.total_bytes += part.nbytes

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor, and write a part if that makes one full.

        Raises:
            OutputError: the name was taken before, or the disk cannot take the part.
        """
        if name in self.names:
            raise OutputError(f"tensor {name} was added twice", hint=CALLER)
        if self._buffered + tensor.nbytes > self._limit:
            self.flush()
        self.names.add(name)
        self._buffer[name] = self._own(tensor)
        self._buffered += tensor.nbytes
        self.total_bytes += tensor.nbytes
        if self._buffered >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory as a part. It stays there if that fails.

        Raises:
            OutputError: the disk cannot take it.
        """
        if not self._buffer:
            return
        path = self._partial.parts / f"{self._count + 1:05}.safetensors"
        temporary = path.with_suffix(".tmp")
        with self._partial.errors():
            save_file(self._buffer, temporary, metadata=METADATA)
            temporary.chmod(self._partial.mode)
            sync(temporary)
            size = temporary.stat().st_size
            os.replace(temporary, path)
        self.open.append(Part(path.name, size, self._buffered, tuple(self._buffer)))
        self._count += 1
        self.drop()

    def drop(self) -> None:
        """Forget what is in memory."""
        self._buffer, self._storages, self._buffered = {}, set(), 0

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as safetensors wants it: on the CPU, contiguous, sharing memory with nothing."""
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # A view of something larger would also keep all of that in memory.
        if storage.data_ptr() in self._storages or storage.nbytes() != tensor.nbytes:
            return tensor.clone()
        self._storages.add(storage.data_ptr())
        return tensor


def grouped(parts: Iterable[Part], limit: int) -> list[tuple[Part, ...]]:
    """Neighbouring parts that fit into a shard together; a part larger than that is a shard of its own."""
    groups: list[list[Part]] = []
    size = 0
    for part in parts:
        if not groups or size + part.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(part)
        size += part.nbytes
    return [tuple(group) for group in groups]
