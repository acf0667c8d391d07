"""What the `quantization_config` of each toolkit says, as one `Settings`.

    quant_method         written by                                   layout, by
    awq                  AutoAWQ, GPTQModel, auto-round, this project  version (or format): "gemm"
    compressed-tensors   llm-compressor                               format: "pack-quantized"
    gptq                 GPTQModel, AutoGPTQ                          checkpoint_format: "gptq" or "gptq_v2"
    auto-round           auto-round                                   packing_format, see `AUTO_ROUND`

The configuration alone decides how tensors are read (`checkpoint.foreign`); nothing is told from their shapes. What a
4-bit AWQ linear cannot say exactly is refused here by name: other bits, quantized activations, sparsity, rotations.
Only compressed-tensors' linears of 8 bits, beside others of 4, are read as 16-bit ones (`checkpoint.eight_bit`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from awq_core.checkpoint.format import (
    Settings,
    module_names,
    quantization_section,
    read_quantization_config,
    valid_group_size,
)
from awq_core.errors import CheckpointError

Section = Mapping[str, Any]

# Older releases kept the settings in a file of their own: AutoAWQ, then AutoGPTQ and GPTQModel.
BESIDE = ("quant_config.json", "quantize_config.json")
# auto-round's packing_format -> layout.
AUTO_ROUND = {
    "auto_round:auto_awq": "gemm",
    "auto_round:awq": "gemm",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
ORIGINAL = "quantize the original model instead"


def read_settings(folder: Path, config: Mapping[str, Any]) -> Settings | None:
    """The settings of a folder quantized by any toolkit of the table, or None where it is not quantized.

    Args:
        config: its parsed config.json; where that has no section, an older release's file beside it is read.

    Raises:
        CheckpointError: quantized in a way that is not read, which is named; settings that make no sense.
    """
    section = quantization_section(config) or _beside(folder)
    if section is None:
        return None
    method = section.get("quant_method")
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise CheckpointError(
            f"the model is quantized with {method or 'an unnamed method'}, not awq",
            hint=f"{', '.join(_METHODS)} are read: {ORIGINAL}",
        )
    return read(section)


def _awq(section: Section) -> Settings:
    settings = read_quantization_config({"quantization_config": section})
    assert settings is not None, "the section is there"
    return _with_overrides(settings, section.get("dynamic"), "dynamic")


def _gptq(section: Section) -> Settings:
    layout = section.get("checkpoint_format") or section.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or section.get("is_marlin_format"):
        layout = "marlin" if section.get("is_marlin_format") else layout
        raise CheckpointError(
            f"the checkpoint stores its weights in the GPTQ layout {layout!r}, only 'gptq' and 'gptq_v2' are read",
            hint=ORIGINAL,
        )
    _four_bits(section, "quantization_config")
    settings = Settings(
        group_size=valid_group_size(section.get("group_size")),
        modules_to_not_convert=module_names(section, "modules_to_not_convert"),
        zero_point=section.get("sym") is not True,
        version=layout,
    )
    return _with_overrides(settings, section.get("dynamic"), "dynamic")


def _auto_round(section: Section) -> Settings:
    packing = section.get("packing_format") or section.get("backend") or "auto"
    layout = AUTO_ROUND.get(packing) if isinstance(packing, str) else None
    if layout is None:
        raise CheckpointError(
            f"the checkpoint stores its weights in the auto-round layout {packing!r}, which is not read",
            hint=f"{', '.join(AUTO_ROUND)} are: export it as one of these",
        )
    _four_bits(section, "quantization_config")
    for key in ("rotation_config", "spinquant_config", "super_bits"):
        _absent(section, key)
    settings = Settings(
        group_size=valid_group_size(section.get("group_size")),
        modules_to_not_convert=module_names(section, "modules_to_not_convert"),
        zero_point=section.get("sym") is False,
        version=layout,
    )
    return _with_overrides(settings, section.get("extra_config"), "extra_config")


def _compressed_tensors(section: Section) -> Settings:
    sparsity = section.get("sparsity_config")
    if not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        _absent(section, "sparsity_config")
    for key in ("transform_config", "kv_cache_scheme"):
        _absent(section, key)
    groups = _mapping(section.get("config_groups"), "config_groups")
    if not groups:
        raise CheckpointError("quantization_config: config_groups names no scheme", hint="download config.json again")
    sizes, symmetric, eight_bit = [], set(), []
    for name, scheme in groups.items():
        where = f"config_groups.{name}"
        scheme = _mapping(scheme, where)
        layout = scheme.get("format") or section.get("format")
        if layout != "pack-quantized":
            raise CheckpointError(
                f"{where} stores its weights in the compressed-tensors format {layout!r}, "
                "only 'pack-quantized' is read",
                hint=ORIGINAL,
            )
        for key in ("input_activations", "output_activations"):
            _absent(scheme, key, where)
        weights = _mapping(scheme.get("weights"), f"{where}.weights")
        wide = weights.get("num_bits") == 8
        checked = {**weights, "num_bits": 4} if wide else weights
        _four_bits(checked, f"{where}.weights", bits="num_bits", kind="type")
        size, middle = _strategy_group_size(weights, where), weights.get("symmetric", True) is True
        if wide:
            eight_bit.append((size, not middle))
        else:
            sizes.append(size)
            symmetric.add(middle)
    if not sizes:
        where = next(iter(groups))
        raise CheckpointError(
            f"config_groups.{where}.weights says num_bits=8, and no group has 4 bits",
            hint=f"8 bits are read beside 4 only: {ORIGINAL}",
        )
    if len(symmetric) > 1:
        raise CheckpointError("quantization_config: some config_groups are symmetric and some are not", hint=ORIGINAL)
    return Settings(
        group_size=sizes[0],
        modules_to_not_convert=module_names(section, "ignore"),
        zero_point=not symmetric.pop(),
        version="pack-quantized",
        other_group_sizes=tuple(sizes[1:]),
        eight_bit=tuple(eight_bit),
    )


_METHODS: dict[str, Callable[[Section], Settings]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
}


def _strategy_group_size(weights: Section, where: str) -> int:
    """The group size of a compressed-tensors scheme: -1 for one scale a row."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size not in (None, -1) else "channel")
    if strategy == "channel":
        return -1
    if strategy != "group":
        raise CheckpointError(f"{where}.weights has the strategy {strategy!r}, not 'group' or 'channel'", hint=ORIGINAL)
    return valid_group_size(size)


def _with_overrides(settings: Settings, overrides: Any, where: str) -> Settings:
    """`settings` with what single linears have instead: {pattern: {"bits": .., "group_size": .., "sym": ..}}.

    Patterns are not matched: which linears are quantized, and in groups of which of these sizes, their tensors say.
    """
    sizes, zero_point = [], settings.zero_point
    for pattern, values in _mapping(overrides or {}, where).items():
        if pattern.startswith("-"):  # GPTQModel's way to keep a linear
            continue
        values = _mapping(values or {}, f"{where}.{pattern}")
        bits = values.get("bits")
        if isinstance(bits, int) and bits >= 16:
            continue
        _four_bits({"bits": 4, **values}, f"{where}.{pattern}")
        if values.get("group_size") is not None:
            sizes.append(valid_group_size(values["group_size"]))
        zero_point |= values.get("sym") is False
    return replace(settings, other_group_sizes=tuple(sizes), zero_point=zero_point)


def _four_bits(values: Section, where: str, *, bits: str = "bits", kind: str = "data_type") -> None:
    """Refuse everything but whole numbers of 4 bits and activations as they are."""
    if values.get(bits) != 4 or type(values[bits]) is not int:
        raise CheckpointError(f"{where} says {bits}={values.get(bits)!r}", hint=f"only 4 bits are read: {ORIGINAL}")
    if (values.get(kind) or "int") != "int":
        raise CheckpointError(f"{where} says {kind}={values[kind]!r}", hint=f"only 'int' is read: {ORIGINAL}")
    activations = values.get("act_bits")
    if activations is not None and not (isinstance(activations, int) and activations >= 16):
        raise CheckpointError(f"{where} says act_bits={activations!r}", hint=f"only weights are read: {ORIGINAL}")


def _absent(values: Section, key: str, where: str = "quantization_config") -> None:
    if values.get(key):
        raise CheckpointError(f"{where} has {key}, which AWQ linears cannot hold", hint=ORIGINAL)


def _mapping(value: Any, where: str) -> Section:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise CheckpointError(
            f"quantization_config: {where} is no table of settings", hint="download config.json again"
        )
    return value


def _beside(folder: Path) -> Section | None:
    """The settings an older release left in a file beside config.json."""
    for name in BESIDE:
        path = folder / name
        if path.is_file():
            try:
                found = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise CheckpointError(f"{path}: not valid JSON: {reason}", hint="download the file again") from error
            section = quantization_section({"quantization_config": _mapping(found, name)})
            if section is not None and "quant_method" not in section and "desc_act" in section:
                return {**section, "quant_method": "gptq"}
            return section
    return None
