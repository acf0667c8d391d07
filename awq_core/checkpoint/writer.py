"""Writing a model folder: tensors into safetensors shards, an index, and the small files, published all at once.

Shards are cut in the order tensors arrive, so that one shard is all that is held in memory; their number, which is
part of their names, is known only at the end. `partial.py` has the protocol that makes the folder appear whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType

import torch
from safetensors.torch import save_file

from awq_core.checkpoint.partial import CALLER, COMMIT, PARTIAL, PartialFolder, disk_errors, sync
from awq_core.checkpoint.shards import INDEX, SINGLE
from awq_core.errors import OutputError


class CheckpointWriter:
    """Collects tensors into shards and publishes them with the other files. A context manager:

        with CheckpointWriter(out) as writer:
            writer.add("model.norm.weight", tensor)
            writer.finish({"config.json": text})

    Leaving the block by an exception removes everything written, and `out` itself if it was made here. Leaving it
    without `finish` does the same and is an error. The same calls give the same bytes.

    Args:
        out: folder to fill; must not exist, or be empty but for what a killed run left.
        shard_bytes: a shard is written before it would grow beyond this, so about this much is held in memory; a
            larger tensor has a shard of its own.

    Raises:
        OutputError: on entering the block, `out` is not empty, not writable or in use by another run; in every
            method, the disk is full or fails.
    """

    def __init__(self, out: str | os.PathLike[str], *, shard_bytes: int = 512 << 20) -> None:
        self.out = Path(out)
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._partial = PartialFolder(self.out)
        self._buffer: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()  # addresses of the memory in the buffer
        self._buffered = 0
        self._shards: list[tuple[str, ...]] = []  # the names in each shard written
        self._names: set[str] = set()

    def __enter__(self) -> CheckpointWriter:
        with disk_errors(self.out):
            self._partial.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffer.clear()
        self._partial.close()
        if kind is None and not self._partial.published:
            raise OutputError(f"{self.out} was not finished, and is removed", hint=CALLER)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, in the dtype to be stored; views and tensors of other devices are copied.

        It is written some time later: do not change it in place after this call.

        Raises:
            OutputError: the name was added before, or the disk cannot take the shard.
        """
        self._refuse_published()
        if name in self._names:
            raise OutputError(f"tensor {name} was added twice", hint=CALLER)
        size = tensor.numel() * tensor.element_size()
        if self._buffered + size > self.shard_bytes:
            self._flush()
        self._names.add(name)
        self._buffer[name] = self._own(tensor)
        self._buffered += size
        self.total_bytes += size
        if self._buffered >= self.shard_bytes:
            self._flush()

    def finish(self, files: Mapping[str, bytes | str | Path]) -> None:
        """Write the last shard, the index of several and `files`, and make all of it appear, config.json last.

        Args:
            files: name in `out` ("a/b" makes a subfolder) -> content, or the file to copy it from. config.json is
                required: until it is there, the folder is no model.

        Raises:
            OutputError: no tensor was added, a name is taken or leads outside, or the disk cannot take it.
        """
        self._refuse_published()
        if COMMIT not in files:
            raise OutputError(f"a checkpoint needs a {COMMIT}", hint=CALLER)
        self._flush()
        if not self._shards:
            raise OutputError("a checkpoint needs tensors, and none was added", hint=CALLER)
        with disk_errors(self.out):
            self._name_shards()
            for name, content in files.items():
                self._write(name, content)
            self._partial.publish()

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as safetensors wants it: on the CPU, contiguous, sharing memory with nothing."""
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # A view of something larger would also keep all of that in memory.
        if storage.data_ptr() in self._storages or storage.nbytes() != tensor.nbytes:
            return tensor.clone()
        self._storages.add(storage.data_ptr())
        return tensor

    def _flush(self) -> None:
        if not self._buffer:
            return
        path = self._partial.stage / f"shard-{len(self._shards) + 1}"
        with disk_errors(self.out):
            save_file(self._buffer, path, metadata={"format": "pt"})
            path.chmod(self._partial.mode)
            sync(path)
        self._shards.append(tuple(self._buffer))
        self._buffer, self._storages, self._buffered = {}, set(), 0

    def _name_shards(self) -> None:
        stage, count = self._partial.stage, len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            os.replace(stage / f"shard-{number}", stage / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            self._write(INDEX, json.dumps(index, indent=2) + "\n")

    def _write(self, name: str, content: bytes | str | Path) -> None:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] in ("/", PARTIAL) or ".." in parts:
            raise OutputError(f"{name!r} is no name of a file inside {self.out}", hint=CALLER)
        path = self._partial.stage.joinpath(*parts)
        if path.exists():
            raise OutputError(f"{name} is written twice", hint=CALLER)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(path)

    def _refuse_published(self) -> None:
        if self._partial.published:
            raise OutputError(f"{self.out} is finished already", hint=CALLER)
