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

from awq_core.checkpoint.eight_bit import widened
from awq_core.checkpoint.foreign import logical_names, read_packed, tensor_names
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.stacks import unstacked
from awq_core.checkpoint.toolkits import read_settings
from awq_core.devices import pick_device, pick_dtype, release_freed_memory
from awq_core.errors import CheckpointError, ConfigError, OutputError
from awq_core.hooks.manager import PluginManager, default_manager
from awq_core.model_folder import claimant, load_config, raw_config, resolve
from awq_core.modules.unclaimed import prepare_unclaimed
from awq_core.runtime.fused import PackedWeights, fuse_blocks, prefer_graphs, report
from awq_core.runtime.grouped import group_experts
from awq_core.runtime.linear import QuantLinear, fake_quantized
from awq_core.runtime.placement import DeviceMap, Places, dispatch, place
from awq_core.skeleton import build_skeleton, checkpoint_names, set_parameter, transposed_names

# Bytes read into memory that is freed again, after which what lies between the weights is given back.
HOLES = 1 << 26


def load(
    model: str | os.PathLike[str],
    *,
    device: str = "cpu",
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | str | None = None,
    plugin: str | None = None,
    trust_remote_code: bool = False,
    manager: PluginManager | None = None,
    fake_quant: bool = False,
    fuse: bool = False,
) -> PreTrainedModel:
    """Load a quantized (or an ordinary) model folder, ready for `generate`.

    Args:
        model: local folder or hub name.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": CUDA where there is one.
        device_map: over several devices, through accelerate: "auto", or module paths and their devices, see
            `runtime.placement`; instead of `device`.
        dtype: of activations and unquantized weights; default: the one the configuration names.
        plugin: owner, where two installed plugins claim the model.
        fake_quant: ordinary linears with dequantized weights instead of int4 kernels; for comparisons.
        fuse: merge and replace what the model's plugin says may be (`runtime.fused`); one line on stderr says what was
            and what was not. The model computes the same.

    Raises:
        CheckpointError: missing, unexpected or misshapen tensors; an unreadable folder.
        ConfigError: a device, dtype or `device_map` that is not possible; the model needs its own code;
            `fuse` with `fake_quant`.
        UnsupportedModelError: `plugin` was named and does not claim the model.
    """
    if fuse and fake_quant:
        raise ConfigError("fuse merges int4 linears, and fake_quant has none", hint="choose one")
    manager = manager or default_manager()
    pick_device(device)  # proved before anything is read
    folder = resolve(model)
    raw = raw_config(folder)
    settings = read_settings(folder, raw)
    owner = claimant(raw, manager, plugin)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    compute = _dtype(dtype, config)
    skeleton = build_skeleton(config, dtype=compute, trust_remote_code=trust_remote_code)
    if owner is not None:
        manager.prepare_model(owner, skeleton)
    elif settings is not None:
        prepare_unclaimed(skeleton)
    backends = manager.kernel_backends()
    with CheckpointReader(folder) as reader:
        reader = unstacked(widened(reader, settings, skeleton), skeleton)
        stored = logical_names(reader.names, settings)
        names = checkpoint_names(skeleton, tuple(stored))
        taken: set[str] = set()
        packed_paths = [name.removesuffix(".weight") for name, on_disk in names.items() if stored[on_disk]]
        places = place(skeleton, device, device_map, () if fake_quant else packed_paths)
        holes = 0
        for path, module in list(skeleton.named_modules()):
            on_disk = names.get(f"{path}.weight")
            if isinstance(module, nn.Linear) and on_disk is not None and stored[on_disk]:
                base = on_disk.removesuffix(".weight")
                if settings is None:
                    raise CheckpointError(
                        f"{folder}: {base}.qweight is packed, but config.json has no quantization_config",
                        hint="restore config.json",
                    )
                shape = (module.out_features, module.in_features)
                packed = read_packed(reader, base, settings, shape=shape, device=places(path))
                values = None
                if module.bias is not None:
                    bias = names.get(f"{path}.bias", f"{base}.bias")
                    values = _shaped(reader, bias, module.bias.shape, places(path))
                    taken.add(bias)
                taken.update(tensor_names(reader, base, settings))
                made: nn.Module
                if fake_quant:
                    made = fake_quantized(packed, values, compute)
                elif fuse:
                    made = PackedWeights(packed, values, compute)
                else:
                    made = QuantLinear(packed, values, compute, backends=backends)
                parent, _, leaf = path.rpartition(".")
                setattr(skeleton.get_submodule(parent), leaf, made)
                holes += packed.qweight.nbytes
                if holes > HOLES:
                    release_freed_memory()
                    holes = 0
        transposed = transposed_names(skeleton)
        for name, on_disk in checkpoint_names(skeleton, reader.names).items():
            if on_disk not in taken:
                slot = skeleton.get_parameter(name) if _is_parameter(skeleton, name) else skeleton.get_buffer(name)
                turned = name in transposed
                short = slot.dtype if slot.is_floating_point() else None
                shape = slot.shape[::-1] if turned else slot.shape
                tensor = _shaped(reader, on_disk, shape, places(name), short)
                set_parameter(skeleton, name, tensor.t().contiguous() if turned else tensor)
                taken.add(on_disk)
        _finish(skeleton, reader, taken, places)
    release_freed_memory()
    if (folder / "generation_config.json").is_file():
        skeleton.generation_config = GenerationConfig.from_pretrained(folder)
    if packed_paths and not fake_quant:
        skeleton.save_pretrained = _refuse_to_save
    if fuse:
        report(fuse_blocks(skeleton, owner, manager))
    group_experts(skeleton)
    if fuse:
        prefer_graphs(skeleton)
    dispatch(skeleton, places)
    return skeleton


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`, which would leave out every int4 linear and say nothing."""
    raise OutputError("a model with int4 linears is for running and is not saved", hint="copy the folder it came from")


def _dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    chosen = dtype if dtype not in (None, "auto") else getattr(config, "dtype", None)
    return torch.float32 if chosen is None else pick_dtype(chosen)


def _shaped(
    reader: CheckpointReader,
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """One tensor of the checkpoint, which must have this shape, in `dtype` or as it is; looked at before it is read."""
    if reader.shape(name) != tuple(shape):
        raise CheckpointError(
            f"{name} has shape {reader.shape(name)}, the model needs {tuple(shape)}",
            hint="is config.json the one these weights were made with?",
        )
    out = torch.empty(reader.shape(name), dtype=dtype or reader.dtype(name), device=device)
    return reader.read_into(name, out)


def _is_parameter(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(path)._parameters


def _finish(model: PreTrainedModel, reader: CheckpointReader, taken: set[str], places: Places) -> None:
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
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(places(f"{path}.{name}"))


def _ignorable(name: str, patterns: Any) -> bool:
    """Tensors old checkpoints carry although the model computes them, and those transformers ignores too."""
    return name.endswith((".rotary_emb.inv_freq", ".masked_bias")) or any(re.search(p, name) for p in patterns)
