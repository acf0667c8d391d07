"""Joining safetensors files into one without holding their tensors: the bytes `save_file` would have written.

A safetensors file is a header and the tensors' bytes, sorted by dtype (widest alignment first) and then by name:

    8 bytes: header length | {"__metadata__":{..},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},..} | a | b | ..

The header of the joined file follows from the headers of the parts. The tensors are then copied, in their new order,
through a small buffer, so the memory this takes does not depend on their size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save

from awq_core.checkpoint.shards import Entry, read_header
from awq_core.errors import CheckpointError

METADATA = {"format": "pt"}
_CHUNK = 4 << 20

_Place = tuple[Path, str, Entry]  # the file a tensor is in, its name, and where it lies there


def concatenate(parts: Sequence[Path], target: Path) -> None:
    """Write the tensors of all `parts`, whose names must be distinct, into the safetensors file `target`.

    Raises:
        CheckpointError: a part is truncated or corrupt.
        OSError: the disk cannot take the result.
    """
    places = [(part, name, entry) for part in parts for name, entry in read_header(part).items()]
    order = _dtype_order(places)
    places.sort(key=lambda place: (order[place[2].dtype], place[1]))
    with open(target, "wb") as file:
        file.write(_header(places))
        for part, _, entry in places:
            _copy(part, entry, file)
    read_header(target)  # the library must agree before anybody removes the parts


def _header(places: Sequence[_Place]) -> bytes:
    header: dict[str, Any] = {"__metadata__": METADATA}
    start = 0
    for _, name, entry in places:
        end = start + entry.nbytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _dtype_order(places: Sequence[_Place]) -> dict[str, int]:
    """Dtype -> its rank in the file. Versions of the library differ in this, so it is asked: it lays out one empty
    tensor of each dtype."""
    empty: dict[str, torch.Tensor] = {}
    for part, name, entry in sorted(places, key=lambda place: place[2].nbytes):
        if entry.dtype not in empty:
            with safe_open(part, framework="pt") as file:
                empty[entry.dtype] = file.get_tensor(name).new_empty(0)
    data = save(empty)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {dtype: rank for rank, dtype in enumerate(header)}


def _copy(part: Path, entry: Entry, target: BinaryIO) -> None:
    left = entry.nbytes
    with open(part, "rb", buffering=0) as source:
        source.seek(entry.start)
        while left:
            chunk = source.read(min(left, _CHUNK))
            if not chunk:
                raise CheckpointError(f"{part} became shorter while it was read")
            target.write(chunk)
            left -= len(chunk)
