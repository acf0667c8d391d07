"""Loading a checkpoint: transformers' own model with `QuantLinear` where the folder holds 4-bit weights.

The body of the model stays transformers' (masks, rope scaling, sliding windows, cache); only linears are replaced.
Every tensor is read from its shard once and goes straight to its place. A tensor that is missing, or one the model has
no place for, is an error: a checkpoint must never run half initialised.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from awq_core.checkpoint.format import read_quantization_config, validate_packed
from awq_core.checkpoint.pack import PackedLinear
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.devices import pick_device, pick_dtype
from awq_core.errors import CheckpointError, UnsupportedModelError
from awq_core.hooks.manager import PluginManager, default_manager
from awq_core.runtime.linear import QuantLinear, fake_quantized
from awq_core.skeleton import (
    Claim,
    build_skeleton,
    checkpoint_names,
    import_auto_module,
    load_config,
    raw_config,
    resolve,
    set_parameter,
)

PACKED = ("qweight", "qzeros", "scales")


def load(
    model: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    plugin: str | None = None,
    trust_remote_code: bool = False,
    manager: PluginManager | None = None,
    fake_quant: bool = False,
) -> PreTrainedModel:
    """Load a quantized (or an ordinary) model folder, ready for `generate`.

    Args:
        model: local folder or hub name.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": CUDA where there is one.
        dtype: of activations and unquantized weights; default: the one the configuration names.
        plugin: owner, where two installed plugins claim the model.
        fake_quant: ordinary linears with dequantized weights instead of int4 kernels; for comparisons.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors; an unreadable folder.
        ConfigError: a device or dtype that is not there; the model needs its own code.
        UnsupportedModelError: `plugin` was named and does not claim the model.
    """
    manager = manager or default_manager()
    target = pick_device(device)
    folder = resolve(model)
    raw = raw_config(folder)
    settings = read_quantization_config(raw)
    owner = None
    try:
        owner = manager.owner(Claim(raw), plugin)
        import_auto_module(owner)
    except UnsupportedModelError:
        if plugin is not None:
            raise
        # scale groups are not needed to run a model; transformers alone can build it
    config = load_config(folder, trust_remote_code=trust_remote_code)
    compute = _dtype(dtype, config)
    skeleton = build_skeleton(config, dtype=compute, trust_remote_code=trust_remote_code)
    if owner is not None:
        manager.prepare_model(owner, skeleton)
    backends = manager.kernel_backends()
    with CheckpointReader(folder) as reader:
        stored = _logical_names(reader.names)
        names = checkpoint_names(skeleton, tuple(stored))
        taken: set[str] = set()
        for path, module in list(skeleton.named_modules()):
            on_disk = names.get(f"{path}.weight")
            if isinstance(module, nn.Linear) and on_disk is not None and stored[on_disk]:
                base = on_disk.removesuffix("weight")
                if settings is None:
                    raise CheckpointError(
                        f"{folder}: {base}qweight is packed, but config.json has no quantization_config",
                        hint="restore config.json",
                    )
                packed = PackedLinear(*(reader.tensor(base + part, device=target) for part in PACKED))
                validate_packed(path, packed, module.in_features, module.out_features, settings.group_size)
                values = None
                if module.bias is not None:
                    bias = names.get(f"{path}.bias", f"{base}bias")
                    values = _shaped(reader, bias, module.bias.shape, target)
                    taken.add(bias)
                taken |= {base + part for part in PACKED}
                made = (
                    fake_quantized(packed, values, compute)
                    if fake_quant
                    else QuantLinear(packed, values, compute, backends=backends)
                )
                parent, _, leaf = path.rpartition(".")
                setattr(skeleton.get_submodule(parent), leaf, made)
        for name, on_disk in checkpoint_names(skeleton, reader.names).items():
            if on_disk not in taken:
                place = skeleton.get_parameter(name) if _is_parameter(skeleton, name) else skeleton.get_buffer(name)
                tensor = _shaped(reader, on_disk, place.shape, target)
                set_parameter(skeleton, name, tensor.to(place.dtype) if place.is_floating_point() else tensor)
                taken.add(on_disk)
        _finish(skeleton, reader, taken, target)
    if (folder / "generation_config.json").is_file():
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    return skeleton


def _dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    chosen = dtype if dtype not in (None, "auto") else getattr(config, "dtype", None)
    return torch.float32 if chosen is None else pick_dtype(chosen)


def _shaped(reader: CheckpointReader, name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """One tensor of the checkpoint, which must have this shape; it is looked at before it is read."""
    if reader.shape(name) != tuple(shape):
        raise CheckpointError(
            f"{name} has shape {reader.shape(name)}, the model needs {tuple(shape)}",
            hint="is config.json the one these weights were made with?",
        )
    return reader.tensor(name, device=device)


def _logical_names(names: tuple[str, ...]) -> dict[str, bool]:
    """Names as an unquantized checkpoint would have them -> whether the weight is packed."""
    logical: dict[str, bool] = {}
    for name in names:
        base, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            logical[f"{base}.weight"] = True
        elif leaf not in ("qzeros", "scales"):
            logical[name] = False
    return logical


def _is_parameter(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(path)._parameters


def _finish(model: PreTrainedModel, reader: CheckpointReader, taken: set[str], device: torch.device) -> None:
    """Tie what shares weights, move buffers, and refuse a model with holes or a checkpoint with leftovers."""
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if missing:
        raise CheckpointError(
            f"{reader.folder}: no weights for {len(missing)} tensors, first {missing[0]}",
            hint="the folder is incomplete: download or quantize it again",
        )
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unexpected = [name for name in reader.names if name not in taken and not _ignorable(name, ignored)]
    if unexpected:
        raise CheckpointError(
            f"{reader.folder}: the model has no place for {len(unexpected)} tensors, first {unexpected[0]}",
            hint="is config.json the one these weights were made with?",
        )
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)


def _ignorable(name: str, patterns: Any) -> bool:
    """Tensors old checkpoints carry although the model computes them, and those transformers ignores too."""
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias")) or any(re.search(p, name) for p in patterns)
