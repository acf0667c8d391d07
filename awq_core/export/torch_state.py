"""A state dict for `torch.load`: the AWQ tensors under their names, in one `model.pt`.

The file is a pickle, and unpickling one can run code. This one holds tensors and nothing else, so it is read with
`torch.load(path, weights_only=True)`, which refuses everything else; so it is read here, before it appears.

`torch.save` wants the whole dictionary at once. Its tensors are maps of the source's files: the system brings a page of
them into memory while it is copied, and can drop it again.
"""

from __future__ import annotations

from pathlib import Path

import numpy
import torch

from awq_core.checkpoint.format import quantization_section
from awq_core.checkpoint.shards import Entry, find_shards, read_header
from awq_core.errors import CheckpointError, OutputError
from awq_core.export.card import Card
from awq_core.export.source import Source
from awq_core.export.staging import put, staged
from awq_core.export.writing import small_files

FILE = "model.pt"
CARD = Card(
    title="AWQ 4-bit state dict",
    tags=("awq", "4-bit", "int4"),
    format='AWQ "gemm" tensors in a torch state dict',
    use=f"A pickle: never open one from a stranger without `weights_only`.\n\n```python\nimport torch\n"
    f'state = torch.load("NAME/{FILE}", weights_only=True, mmap=True)\n```',
)


def write(source: Source, out: Path, to: str = "torch") -> None:
    """Write `source`, which must be AWQ gemm already, as a state dict with the small files beside it.

    Raises:
        CheckpointError: `source` is in another layout, or a tensor is in a dtype that torch has not.
        OutputError: `out` is not empty, holds an unfinished run, or the disk cannot take it.
    """
    if source.settings.version != "gemm":
        raise CheckpointError(
            f"{source.folder} is in the layout {source.settings.version!r}, and a state dict is made of AWQ gemm",
            hint=f"awq import {source.folder} --out DIR, then export DIR",
        )
    folder = source.folder
    entries = {n: entry for shard in find_shards(folder)[0] for n, entry in read_header(folder / shard).items()}
    state = {name: mapped(folder, entries[name], source.reader.dtype(name)) for name in source.reader.names}
    with staged(out) as stage:
        try:
            torch.save(state, stage / FILE)
        except RuntimeError as error:  # how torch reports a disk that takes no more
            reason = " ".join(str(error).split())
            raise OutputError(f"cannot write {FILE} to {out}: {reason}", hint="is the disk full?") from error
        _prove(stage / FILE, state)
        put(stage, small_files(source, quantization_section(source.raw), CARD))


def mapped(folder: Path, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of a folder's files, mapped and not read; changing it changes no file."""
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=dtype)
    place = numpy.memmap(folder / entry.shard, numpy.uint8, "c", entry.start, (entry.nbytes,))
    return torch.from_numpy(place).view(dtype).reshape(entry.shape)


def _prove(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Read the file back the only way it is to be read.

    Raises:
        OutputError: it does not hold what was written.
    """
    found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    same = {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()}
    if same != {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}:
        raise OutputError(f"{path} does not read back as it was written", hint="is the disk sound?")
