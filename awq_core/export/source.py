"""A quantized folder opened for conversion: what it holds, by name, without reading a weight.

Which linears are quantized, the tensors say. Which are kept, only the model does: the file of a tied output head has no
tensor for it, and a tensor `[rows, columns]` may be an embedding. So the model's module tree is built, without weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from awq_core.checkpoint.eight_bit import widened
from awq_core.checkpoint.foreign import logical_names, packed_names, read_packed, tensor_names
from awq_core.checkpoint.format import Settings
from awq_core.checkpoint.pack import PackedLinear
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.toolkits import read_settings
from awq_core.errors import CheckpointError
from awq_core.hooks.manager import default_manager
from awq_core.model_folder import claimant, load_config, raw_config, resolve
from awq_core.modules.unclaimed import prepare_unclaimed
from awq_core.skeleton import build_skeleton, checkpoint_names, matrices, transposed_names


@dataclass(frozen=True, slots=True)
class Source:
    """An opened folder. Linears go by their names on disk.

    Attributes:
        raw: its config.json.
        linears: those quantized, name on disk -> name in the model.
        shapes: `(out, in)` of those, by the name on disk.
        kept: those that are not, by both names.
        sideways: linears whose unquantized weight is `[in, out]` on disk.
        lm_head: whether the output head is quantized.
        code: whether the model's own `*.py` are to be carried over.
        model: its module tree without weights, as it was when the model was quantized.
        stored: names of its weights on disk, by their names in the model.
        plugin: the owner that was named, where two claim the model.
        eight_bit: kept linears that the result holds in 8 bits, name on disk -> name in the model.
    """

    folder: Path
    raw: dict[str, Any]
    settings: Settings
    reader: CheckpointReader
    linears: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    kept: tuple[str, ...]
    sideways: frozenset[str]
    lm_head: bool
    code: bool
    model: PreTrainedModel
    stored: Mapping[str, str]
    plugin: str | None = None
    eight_bit: Mapping[str, str] = field(default_factory=dict)

    def linear(self, name: str) -> PackedLinear:
        """One quantized linear.

        Raises:
            CheckpointError: it cannot be read, or is in groups of another size than config.json says of all.
        """
        packed = read_packed(self.reader, name, self.settings)
        rows = packed.qweight.shape[0]
        if packed.group_size != (rows if self.settings.group_size == -1 else self.settings.group_size):
            raise CheckpointError(
                f"{name} is in groups of {packed.group_size}, other linears of {self.settings.group_size}",
                hint="formats with one group size only are written: quantize the original model instead",
            )
        return packed

    def weights(self) -> Iterator[tuple[str, PackedLinear | torch.Tensor]]:
        """Everything there is in the order of the files: quantized linears by their name, other tensors by theirs.
        One at a time is in memory."""
        parts = {part: name for name in self.linears for part in tensor_names(self.reader, name, self.settings)}
        done: set[str] = set()
        for stored in self.reader.names:
            name = parts.get(stored)
            if name is None:
                yield stored, self.reader.tensor(stored)
            elif name not in done:
                done.add(name)
                yield name, self.linear(name)


@contextmanager
def open_source(
    folder: str | os.PathLike[str], *, plugin: str | None = None, trust_remote_code: bool = False
) -> Iterator[Source]:
    """Open a quantized folder.

    Args:
        plugin: owner, where two installed plugins claim the model.

    Raises:
        CheckpointError: not quantized, or not readable.
        ConfigError: the model needs its own code, and `trust_remote_code` was not given.
        UnsupportedModelError, PluginConflictError: `plugin` does not claim the model; two do, and none was named.
    """
    root = resolve(folder)
    raw = raw_config(root)
    settings = read_settings(root, raw)
    if settings is None:
        raise CheckpointError(f"{root} is not quantized", hint=f"awq quantize {root} --out DIR, then export DIR")
    with CheckpointReader(root) as reader:
        model = _model(root, raw, plugin, trust_remote_code)
        reader = widened(reader, settings, model)
        packed = packed_names(reader.names, settings)
        if not packed:
            raise CheckpointError(
                f"{root}: config.json says quantized, and no linear is", hint="do config.json and the weights belong?"
            )
        stored = checkpoint_names(model, tuple(logical_names(reader.names, settings)))
        paths = {on_disk: path for path, on_disk in stored.items()}
        linears = {name: paths.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in packed}
        head = model.get_output_embeddings()
        yield Source(
            folder=root,
            raw=raw,
            settings=settings,
            reader=reader,
            linears=linears,
            shapes={name: tuple(model.get_submodule(path).weight.shape) for name, path in linears.items()},
            kept=tuple(_kept(model, stored, linears)),
            sideways=frozenset(stored[name].removesuffix(".weight") for name in transposed_names(model) & set(stored)),
            lm_head=any(model.get_submodule(path) is head for path in linears.values() if head is not None),
            code=trust_remote_code,
            model=model,
            stored=stored,
            plugin=plugin,
        )


def _model(folder: Path, raw: dict[str, Any], plugin: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The module tree as it was when the model was quantized: experts apart, Conv1D as linears."""
    manager = default_manager()
    owner = claimant(raw, manager, plugin)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    if owner is not None:
        manager.prepare_model(owner, model)
    else:
        prepare_unclaimed(model)
    return model


def _kept(model: PreTrainedModel, stored: dict[str, str], linears: dict[str, str]) -> dict[str, None]:
    """Names of everything with a weight `[out, in]` that is neither an embedding nor quantized: in the model, and on
    disk where that differs."""
    kept: dict[str, None] = {}
    for path in matrices(model):
        on_disk = stored.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
        if on_disk not in linears:
            kept |= {path: None, on_disk: None}
    return kept
