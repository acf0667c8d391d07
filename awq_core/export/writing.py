"""The folder of an export: tensors shard by shard, config.json with another section, the small files, the card.

One linear is in memory at a time, and one shard of what is written. `checkpoint.writer` makes the folder appear whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from awq_core.checkpoint.files import side_files
from awq_core.checkpoint.pack import PackedLinear
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.devices import release_freed_memory
from awq_core.errors import OutputError
from awq_core.export.card import Card
from awq_core.export.source import Source

# Turns a quantized linear, by its name, or another tensor, by its own, into tensors of a format, by their full names.
Convert = Callable[[str, PackedLinear], Mapping[str, torch.Tensor]]
Other = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]
SECTIONS = ("quantization_config", "compression_config")


def write_folder(
    source: Source,
    out: Path,
    convert: Convert,
    section: dict[str, Any] | None,
    card: Card,
    other: Other = lambda name, tensor: {name: tensor},
) -> None:
    """Write `source` to `out`, its quantized linears as `convert` says and everything else as `other` does.

    Args:
        section: the `quantization_config` of the result; None for a model that is not quantized.
        other: default: as it is.

    Raises:
        CheckpointError: a tensor cannot be read or converted.
        OutputError: `out` is not empty, holds an unfinished run, or the disk cannot take it.
    """
    with CheckpointWriter(out) as writer:
        if writer.unfinished is not None:
            raise unfinished(out)
        for name, value in source.weights():
            made = convert(name, value) if isinstance(value, PackedLinear) else other(name, value)
            for part, tensor in made.items():
                writer.add(part, tensor)
            if isinstance(value, PackedLinear):
                release_freed_memory()
        writer.finish(small_files(source, section, card))


def small_files(source: Source, section: dict[str, Any] | None, card: Card) -> dict[str, bytes | str | Path]:
    """Everything but the weights, by name: tokenizer, generation settings, chat template, config.json, README.md."""
    config = {**plain_config(source.raw), **({} if section is None else {"quantization_config": section})}
    readme = source.folder / "README.md"
    original = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return {
        **side_files(source.folder, include_code=source.code),
        "config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "README.md": card.text(original, source.folder.resolve().name),
    }


def plain_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of quantization, in the configurations of its parts either."""
    return {
        key: {one: item for one, item in value.items() if one not in SECTIONS} if isinstance(value, dict) else value
        for key, value in raw.items()
        if key not in SECTIONS
    }


def unfinished(out: Path) -> OutputError:
    """An export never clears the work of a run that can go on."""
    return OutputError(
        f"{out} holds an unfinished run of awq quantize", hint="choose another --out, or finish that run first"
    )
