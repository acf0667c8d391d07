"""What makes a folder an AWQ checkpoint: the `quantization_config` and three tensors a linear.

`config.json` says, beside everything the original said:

    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true,
                            "version": "gemm", "modules_to_not_convert": ["lm_head", ...]}

and each quantized linear's `weight` is replaced by `qweight`, `qzeros` and `scales`
(`awq_core.checkpoint.pack` has the layout). A group size of -1 means one group over all input features.

Reading is stricter than it looks necessary: engines ignore `version`, so a checkpoint in another layout does not
fail there, it answers nonsense. Here every layout but this one is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from awq_core.errors import CheckpointError

PER_WORD = 8
SCALE_DTYPES = (torch.float16, torch.bfloat16)
# Old tools' spellings, and the key under which transformers 5 keeps `version`.
_SPELLINGS = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size"), "version": ("version", "format")}
# Where configurations keep it: transformers, and the first releases of compressed-tensors.
_SECTIONS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a quantized checkpoint says of itself.

    Attributes:
        group_size: input channels that share one scale; -1 is the whole row.
        modules_to_not_convert: full prefixes of the linears kept in their own precision.
        bits: always 4.
        zero_point: False where every zero point is 8, the middle of the codes.
        version: the layout: "gemm", this format's, or one of `checkpoint.foreign.LAYOUTS`.
        other_group_sizes: those that some linears have instead, in checkpoints of other tools.
        eight_bit: (group size, whether there are zero points) of linears of 8 bits, which are read as 16-bit ones, see
            `checkpoint.eight_bit`; in checkpoints of other tools.
    """

    group_size: int
    modules_to_not_convert: tuple[str, ...] = ()
    bits: int = 4
    zero_point: bool = True
    version: str = "gemm"
    other_group_sizes: tuple[int, ...] = ()
    eight_bit: tuple[tuple[int, bool], ...] = ()


class Packed(Protocol):
    """Anything with the three tensors of a quantized linear, `checkpoint.pack.PackedLinear` for one."""

    @property
    def qweight(self) -> torch.Tensor: ...
    @property
    def qzeros(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...


def quantization_config(
    *, group_size: int, modules_to_not_convert: Sequence[str], lm_head: bool = False
) -> dict[str, Any]:
    """The `quantization_config` that transformers, vLLM and SGLang read; ready for JSON.

    Args:
        lm_head: the output head is quantized, which engines want to be told by a key of its own.
    """
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(modules_to_not_convert),
        **({"lm_head": True} if lm_head else {}),
    }


def already_quantized(config: Mapping[str, Any]) -> str | None:
    """What a model is quantized with, by any tool ("awq", "fp8", ...); None for an ordinary checkpoint.

    Args:
        config: the parsed config.json, or an old tool's quant_config.json.
    """
    section = quantization_section(config)
    return None if section is None else str(section.get("quant_method") or "an unnamed method")


def read_quantization_config(config: Mapping[str, Any]) -> Settings | None:
    """The settings of an AWQ checkpoint, or None where the model is not quantized.

    Args:
        config: the parsed config.json, or the quant_config.json that old tools wrote beside it
            (`w_bit`, `q_group_size`, no `quant_method`). Both key spellings are accepted in both.

    Raises:
        CheckpointError: quantized with another method, in another layout, or with settings this format cannot hold.
    """
    section = quantization_section(config)
    if section is None:
        return None
    values = {key: next((section[n] for n in names if n in section), None) for key, names in _SPELLINGS.items()}
    method, version = section.get("quant_method"), str(values["version"] or "gemm").lower()
    if method != "awq":
        raise CheckpointError(
            f"the model is quantized with {method or 'an unnamed method'}, not awq",
            hint="quantize the original model instead",
        )
    if version != "gemm" or section.get("backend") == "llm-awq":
        layout = version if version != "gemm" else "llm-awq"
        raise CheckpointError(
            f"the checkpoint stores its weights in the AWQ layout {layout!r}, only 'gemm' is read",
            hint="quantize the original model again, or get a version 'gemm' checkpoint of it",
        )
    bits, zero_point = values["bits"], section.get("zero_point", True)
    if bits != 4:
        raise CheckpointError(f"quantization_config says bits={bits!r}", hint="only 4-bit AWQ checkpoints are read")
    if not isinstance(zero_point, bool):
        raise CheckpointError(f"quantization_config says zero_point={zero_point!r}", hint="expected true or false")
    return Settings(
        group_size=valid_group_size(values["group_size"]),
        modules_to_not_convert=module_names(section, "modules_to_not_convert"),
        zero_point=zero_point,
    )


def valid_group_size(value: Any) -> int:
    """`value`, a positive number or -1. Raises CheckpointError for everything else."""
    if type(value) is not int or (value != -1 and value <= 0):
        raise CheckpointError(
            f"quantization_config says group_size={value!r}", hint="expected a positive number, or -1 for the row"
        )
    return value


def module_names(section: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """The list of module names under `key`; null and nothing are empty. Raises CheckpointError for everything else."""
    names = section.get(key) or ()
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"quantization_config: {key} is no list of module names")
    return tuple(names)


def expected_tensors(
    name: str,
    in_features: int,
    out_features: int,
    group_size: int,
    scales_dtype: torch.dtype = torch.float16,
    bias: bool = False,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Full tensor name -> (shape, dtype) of one quantized linear, in the order qweight, qzeros, scales, bias.

    Raises:
        CheckpointError: the group size does not divide `in_features`, or `out_features` is not a multiple of 8.
    """
    group = in_features if group_size == -1 else group_size
    if group <= 0 or in_features % group:
        raise CheckpointError(
            f"{name}: group size {group_size} does not divide {in_features} input features",
            hint="choose a group size that does, or keep this linear",
        )
    if out_features % PER_WORD:
        raise CheckpointError(
            f"{name}: {out_features} output features cannot be packed eight to a word", hint="keep this linear"
        )
    groups, words = in_features // group, out_features // PER_WORD
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        f"{name}.qweight": ((in_features, words), torch.int32),
        f"{name}.qzeros": ((groups, words), torch.int32),
        f"{name}.scales": ((groups, out_features), scales_dtype),
    }
    return {**tensors, f"{name}.bias": ((out_features,), scales_dtype)} if bias else tensors


def validate_packed(name: str, packed: Packed, in_features: int, out_features: int, group_size: int) -> None:
    """Prove that three tensors from a checkpoint are what one linear needs; reads no values, so meta tensors do.

    Raises:
        CheckpointError: names the tensor whose shape or dtype is wrong.
    """
    expected = expected_tensors(name, in_features, out_features, group_size)
    for tensor, (full_name, (shape, dtype)) in zip(
        (packed.qweight, packed.qzeros, packed.scales), expected.items(), strict=True
    ):
        found = tuple(tensor.shape)
        if found != shape:
            raise CheckpointError(
                f"{full_name} has shape {found}, expected {shape}", hint=_why(found, in_features, out_features)
            )
        allowed = SCALE_DTYPES if full_name.endswith(".scales") else (dtype,)
        if tensor.dtype not in allowed:
            raise CheckpointError(
                f"{full_name} is {tensor.dtype}, expected {' or '.join(map(str, allowed))}",
                hint="the checkpoint was not written in the AWQ gemm layout",
            )


def _why(found: tuple[int, ...], in_features: int, out_features: int) -> str:
    """The likeliest reason for a wrong shape: a layout of another tool, told by its qweight, or another model."""
    if found == (in_features // PER_WORD, out_features):
        return "this is the GPTQ layout, not AWQ gemm"
    if found == (out_features, in_features // PER_WORD):
        return "this is the AWQ gemv layout, only gemm is read"
    return "is config.json, with its group_size, the one these weights were made with?"


def quantization_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization settings inside a configuration, with `quant_method` filled in for the oldest AWQ files."""
    # Models of several parts may keep it in the sub-configuration of the language model.
    for place in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in _SECTIONS:
            # An empty section is how some tools say "not quantized".
            if isinstance(place.get(key), Mapping) and place[key]:
                return _named(place[key])
    return _named(config) if "w_bit" in config or "q_group_size" in config else None


def _named(section: Mapping[str, Any]) -> dict[str, Any]:
    old_awq = "quant_method" not in section and ("w_bit" in section or "zero_point" in section)
    return {**section, "quant_method": "awq"} if old_awq else dict(section)
