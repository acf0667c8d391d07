"""Reading a model folder one tensor at a time.

All headers are read and checked when the folder is opened, weights only when asked for: a truncated last shard is
found at once, not after hours of work, yet a model far larger than memory can be opened.

The safetensors library judges the headers. The bytes are read here into fresh memory rather than through its memory
map, for two reasons that matter to a program that walks a whole model and edits weights in place: mapped pages stay
resident until the file is closed, so peak memory would grow with the model; and tensors read from one map share it,
so a second read would return the edited weight.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch

from awq_core.checkpoint.shards import AGAIN, INDEX, Entry, find_shards, read_header
from awq_core.errors import CheckpointError, NumericsError

_DTYPES = {
    code: getattr(torch, name)
    for code, name in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    }.items()
    if hasattr(torch, name)
}  # fmt: skip
_CHUNK = 1 << 24  # elements looked at together, bytes read together x 16


class CheckpointReader:
    """The tensors of a local model folder; a context manager.

    Understands `model.safetensors`, `model.safetensors.index.json` with shards, and a lone `*.safetensors` of another
    name. Tensors of one reader may be read from several threads.

    Attributes:
        folder: the folder.
        names: every tensor name on disk, in the order of files and of bytes in them.
        total_bytes: size of all tensors.

    Raises:
        CheckpointError: no such folder, nothing readable in it, a missing, truncated or corrupt shard, an index that
            contradicts the shards or names a file outside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._files: dict[str, int] = {}
        shards, claimed = find_shards(self.folder)
        self._entries: dict[str, Entry] = {}
        for shard in shards:
            for name, entry in read_header(self.folder / shard).items():
                if name in self._entries:
                    first = self._entries[name].shard
                    raise CheckpointError(
                        f"{self.folder}: tensor {name!r} is in {first} and in {shard}",
                        hint="remove the file that does not belong to this model",
                    )
                self._entries[name] = entry
        for name, shard in claimed.items():
            if name not in self._entries or self._entries[name].shard != shard:
                raise CheckpointError(f"{self.folder / INDEX} names {name!r}, which {shard} does not hold", hint=AGAIN)
        self.names = tuple(self._entries)
        self.total_bytes = sum(entry.nbytes for entry in self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading again would open them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header. Raises CheckpointError for an unknown name, as the methods below do."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype from the header. Raises CheckpointError where torch has no such dtype."""
        entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise CheckpointError(f"{self.folder / entry.shard}: {name} is {entry.dtype}, which torch cannot hold")
        return _DTYPES[entry.dtype]

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating-point dtype most of the checkpoint's bytes are in; float32 where there is none."""
        sizes: Counter[torch.dtype] = Counter()
        for name in self.names:
            sizes[self.dtype(name)] += self.nbytes(name)
        return next((dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point), torch.float32)

    def nbytes(self, name: str) -> int:
        """Size on disk."""
        return self._entry(name).nbytes

    def tensor(
        self,
        name: str,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        check_finite: bool = True,
        rows: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Args:
            rows: only those from the first number to before the second are read; others never come into memory.
            device: where to put it.
            dtype: cast floating-point tensors to this; others, and float8 with dtype None, stay as they are.
            check_finite: refuse NaN and inf, in the file or made by the cast.

        Raises:
            CheckpointError: unknown name, or the file shrank or failed since it was opened.
            NumericsError: the tensor holds NaN or inf.
        """
        entry = _rows(self._entry(name), rows) if rows else self._entry(name)
        buffer = torch.empty(entry.nbytes, dtype=torch.uint8)
        self._fill(buffer.numpy().data, entry)
        tensor = buffer.view(self.dtype(name)).reshape(entry.shape)
        if check_finite:
            self._require_finite(name, tensor)
        if dtype is not None and dtype != tensor.dtype and tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if check_finite and not _all_finite(tensor):
                raise NumericsError(f"{name} overflows {dtype}", hint="use bfloat16 or float32")
        return tensor.to(device)

    def read_into(self, name: str, out: torch.Tensor, *, check_finite: bool = True) -> torch.Tensor:
        """Read one tensor into `out`, which has its shape: cast to the dtype of `out` and sent to its device a few rows
        at a time, so that there is never a second copy of the whole. Returns `out`.

        Raises:
            CheckpointError, NumericsError: as `tensor`.
        """
        entry, stored = self._entry(name), self.dtype(name)
        if out.device.type == "cpu" and out.dtype == stored and out.is_contiguous():
            self._fill(out.view(-1).view(torch.uint8).numpy().data, entry)
            if check_finite:
                self._require_finite(name, out)
        elif not entry.shape or not entry.nbytes:
            out.copy_(self.tensor(name, dtype=out.dtype, check_finite=check_finite))
        else:
            step = max(1, _CHUNK * entry.shape[0] // entry.nbytes)
            for first in range(0, entry.shape[0], step):
                rows = (first, min(first + step, entry.shape[0]))
                part = self.tensor(name, dtype=out.dtype, check_finite=check_finite, rows=rows)
                out[first : rows[1]].copy_(part)
        return out

    def _require_finite(self, name: str, tensor: torch.Tensor) -> None:
        if not _all_finite(tensor):
            where = self.folder / self._entry(name).shard
            raise NumericsError(f"{where}: {name} holds NaN or inf", hint=f"the checkpoint is damaged: {AGAIN}")

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(
                f"{self.folder} has no tensor {name!r}", hint="do config.json and the weights belong together?"
            ) from None

    def _fill(self, view: memoryview, entry: Entry) -> None:
        path = self.folder / entry.shard
        try:
            if entry.shard not in self._files:
                self._files[entry.shard] = os.open(path, os.O_RDONLY)
            done = 0
            while done < entry.nbytes:
                # Positioned reads, so that threads do not disturb each other; one call reads 2 GiB at most.
                got = os.preadv(self._files[entry.shard], [view[done : done + 16 * _CHUNK]], entry.start + done)
                if not got:
                    raise CheckpointError(f"{path} became shorter while it was read", hint=AGAIN)
                done += got
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint=AGAIN) from error


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """A sha256 that changes when the model does: config.json, every header, file sizes and a few bytes of each shard.

    Cheap whatever the size of the model. The sample of 16 short stretches a shard tells fine-tunes of one base apart,
    whose headers are equal; a change confined to single weights can still go unseen.

    Raises:
        CheckpointError: as `CheckpointReader`.
    """
    root = Path(folder)
    shards, _ = find_shards(root)
    digest = hashlib.sha256()
    try:
        config = root / "config.json"
        digest.update(config.read_bytes() if config.is_file() else b"")
        for shard in shards:
            with open(root / shard, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                digest.update(f"\n{shard} {size} {length}\n".encode())
                digest.update(file.read(min(length, size)))
                for part in range(16):
                    file.seek(8 + length + max(0, size - 8 - length - 4096) * part // 15)
                    digest.update(file.read(4096))
    except OSError as error:
        raise CheckpointError(f"{error.filename or root} cannot be read: {error.strerror}", hint=AGAIN) from error
    return digest.hexdigest()


def _rows(entry: Entry, rows: tuple[int, int]) -> Entry:
    """Where some rows of a tensor lie."""
    first, end = (min(row, entry.shape[0]) for row in rows)
    size = entry.nbytes // entry.shape[0]
    return replace(
        entry, start=entry.start + first * size, nbytes=(end - first) * size, shape=(end - first, *entry.shape[1:])
    )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or inf, a chunk at a time and without temporary tensors of the same size."""
    if not tensor.is_floating_point():
        return True
    for chunk in tensor.reshape(-1).split(_CHUNK) if tensor.numel() else ():
        # Minimum and maximum carry NaN along, and cost a fortieth of isfinite().all().
        ends = torch.aminmax(chunk.float() if chunk.element_size() == 1 else chunk)
        if not (math.isfinite(ends.min) and math.isfinite(ends.max)):
            return False
    return True
