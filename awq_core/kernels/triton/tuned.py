"""The tiles that `awq tune` measured on this machine, in a file: written whole, read when a model is loaded.

    $XDG_CACHE_HOME/awq/tiles-<GPU>-<triton version>.json          or ~/.cache/awq/...

One file for each kind of GPU and version of Triton, since another of either compiles other code. Where there is none,
or an entry is not one that could have been measured, the shipped table holds: a broken file costs speed, nothing else.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from awq_core.devices import dtype_name
from awq_core.errors import OutputError
from awq_core.kernels.cpu.build import BuildError, cache_folder
from awq_core.kernels.triton.tiles import BUCKETS, DEFAULTS, MAX_SPLIT, TUNED, Key, Tile, choose

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float16, torch.bfloat16)}
FIELDS = ("device", "dtype", "outputs", "inputs", "group", "bucket")


def path_for(device_name: str) -> Path:
    """The file for a GPU of this name ("NVIDIA H200").

    Raises:
        BuildError: there is no cache folder that is this user's alone.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache_folder() / f"tiles-{plain}-{version('triton')}.json"


def read(path: Path) -> dict[Key, Tile]:
    """What the file holds; nothing where there is none. Entries that make no sense are left out and said on stderr."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print(f"tuned tiles not used: {path}: {' '.join(str(error).split())}", file=sys.stderr)
        return {}
    found = {}
    entries = entries if isinstance(entries, list) else [None]
    for entry in entries:
        try:
            key, tile = _parsed(entry)
        except (KeyError, TypeError, ValueError):
            print(f"tuned tiles: {path} has an entry that is none: run awq tune again", file=sys.stderr)
            continue
        found[key] = tile
    return found


def _parsed(entry: Any) -> tuple[Key, Tile]:
    tile = Tile(**{name: int(entry["tile"][name]) for name in ("rows", "tokens", "split", "warps", "stages")})
    device, dtype, *numbers = (entry[name] for name in FIELDS)
    outputs, inputs, group, bucket = map(int, numbers)
    possible = (
        device in DEFAULTS
        and tile.rows in (64, 128)
        and tile.tokens == bucket in BUCKETS
        and 1 <= tile.split <= MAX_SPLIT
        and tile.warps in (1, 2, 4, 8)
        and 1 <= tile.stages <= 8
    )
    if not possible:
        raise ValueError(entry)
    return (device, DTYPES[dtype], outputs, inputs, group, bucket), tile


def write(path: Path, found: Mapping[Key, Tile]) -> None:
    """Add to the file, or replace what it says of the same keys.

    Raises:
        OutputError: it cannot be written.
    """
    entries = [
        dict(zip(FIELDS, (device, dtype_name(dtype), *numbers), strict=True)) | {"tile": asdict(tile)}
        for (device, dtype, *numbers), tile in (read(path) | dict(found)).items()
    ]
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(entries, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}", hint="XDG_CACHE_HOME names another place"
        ) from error
    use(found)


def use(found: Mapping[Key, Tile]) -> None:
    """Let `tiles.choose` know them."""
    TUNED.update(found)
    choose.cache_clear()


@cache
def use_file_for(device: torch.device) -> int:
    """Read the file of this GPU, once a process; returns how many tiles it holds."""
    if device.type != "cuda":
        return 0
    try:
        found = read(path_for(torch.cuda.get_device_name(device)))
    except BuildError:
        return 0
    use(found)
    return len(found)


def describe() -> str:
    """Whether a tuned table is in use, in a few words."""
    count = use_file_for(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else 0
    return f"tiles tuned by awq tune: {count}" if count else "tiles not tuned"
