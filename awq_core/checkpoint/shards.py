"""Which files of a folder hold the weights, and what their headers say; every way this can be wrong, by name.

A safetensors file is a JSON header (names, dtypes, shapes, byte ranges) before the raw bytes:

    8 bytes: header length | header, JSON | data: tensor a, tensor b, ...

Large models are cut into several such files, with an index that names the file of each tensor. An index is untrusted
input: it may only name plain files inside its folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from awq_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: its shard, its place in that file, and what the header says of it."""

    shard: str
    start: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


def find_shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """File names in order, and the index's claims: tensor name -> file name (empty without an index)."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder", hint="give the folder that holds config.json")
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if (folder / INDEX).is_file():
        claimed = _read_index(folder / INDEX)
        shards = sorted(set(claimed.values()))
        for shard in shards:
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder}: shard {shard} is missing", hint="download the model again")
        return shards, claimed
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise CheckpointError(
            f"{folder}: {len(found)} .safetensors files but no {INDEX} to say what belongs together",
            hint="copy the index file of the model too",
        )
    if any(folder.glob("pytorch_model*.bin*")):
        raise CheckpointError(
            f"{folder} holds pickled weights (pytorch_model.bin), which can run code and are not read",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new)",
        )
    raise CheckpointError(f"{folder} holds no .safetensors file", hint="is this the folder of a whole model?")


def _read_index(path: Path) -> dict[str, str]:
    try:
        index: Any = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable index: {_line(error)}", hint=AGAIN) from error
    claimed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(claimed, dict) or not claimed:
        raise CheckpointError(f"{path} has no weight_map that names tensors", hint=AGAIN)
    for name, shard in claimed.items():
        plain = isinstance(shard, str) and not set(shard) & set("/\\\0") and shard.endswith(".safetensors")
        if not plain:
            raise CheckpointError(
                f"{path} places {name!r} in {shard!r}, which is no plain .safetensors name inside the folder",
                hint="do not use a model whose index points elsewhere",
            )
    return claimed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} is listed twice")
        result[key] = value
    return result


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> place, in the order of the bytes. The library first proves that header and file agree."""
    try:
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {_line(error)}", hint=AGAIN) from error
    header.pop("__metadata__", None)
    entries = {
        name: Entry(path.name, 8 + length + start, end - start, tuple(info["shape"]), info["dtype"])
        for name, info in header.items()
        for start, end in [info["data_offsets"]]
    }
    return dict(sorted(entries.items(), key=lambda item: (item[1].start, item[0])))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
