"""compressed-tensors, format "pack-quantized": what llm-compressor writes and transformers, vLLM and SGLang load.

    weight_packed      int32 [out, in/8]        q - 8, stored plus 8: the codes themselves, eight inputs a word
    weight_zero_point  int32 [out/8, groups]    z - 8, stored plus 8, eight outputs a word; none if all are 8
    weight_scale             [out, groups]
    weight_shape       int64 [2]                out, in

A linear of 8 bits has four numbers a word and 128 in the place of 8. The configuration names classes of modules to
quantize, and then, one by one, those that are not: `ignore`. With linears of 8 bits it names those of each scheme.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.export.card import Card
from awq_core.export.eight_bit import nearest
from awq_core.export.neighbours import pack_columns, pack_rows
from awq_core.export.source import Source
from awq_core.export.writing import write_folder
from awq_core.modules import UnstackedExperts

ENABLE = "awq_core.integrations.compressed_tensors"


def write(source: Source, out: Path, to: str = "compressed-tensors") -> None:
    """Write `source` as compressed-tensors.

    Raises:
        NumericsError: a linear of 8 bits has scales that float16 cannot hold.
    """
    convert = partial(tensors, symmetric=not source.settings.zero_point)
    write_folder(source, out, convert, section(source), card(source), partial(eight_bit_tensors, source))


def notes(source: Source) -> tuple[str, ...]:
    """What transformers (5.23) cannot load without `awq_core.integrations.compressed_tensors`."""
    packed = {*source.linears.values(), *source.eight_bit.values()}
    reasons = {
        "its linears have 4 and 8 bits": bool(source.eight_bit),
        "its experts have zero points": source.settings.zero_point
        and any(path.startswith(layer + ".") for layer, _ in _experts(source) for path in packed),
        "its Conv1D are turned": bool(source.sideways & {*source.linears, *source.eight_bit}),
    }
    why = ", ".join(reason for reason, holds in reasons.items() if holds)
    return (f"transformers loads it after {ENABLE}.enable(): {why}",) if why else ()


def card(source: Source) -> Card:
    """What the model card says."""
    before, call = (f"from {ENABLE} import enable\n", "enable()\n") if notes(source) else ("", "")
    return Card(
        title="4-bit",
        tags=("compressed-tensors", "awq", "4-bit", "int4"),
        format='compressed-tensors "pack-quantized": 4-bit codes found by AWQ, zero points'
        + (", kept linears in 8 bits" if source.eight_bit else ""),
        use=f"With the package `compressed-tensors` installed:\n\n```python\n{before}"
        f'from transformers import AutoModelForCausalLM\n{call}model = AutoModelForCausalLM.from_pretrained("NAME")\n'
        "```\n\n```\nvllm serve NAME\n```",
    )


def section(source: Source) -> dict[str, Any]:
    """The `quantization_config`."""
    group = source.settings.group_size
    schemes = []
    # The 8-bit ones first: transformers (5.23) decodes every linear with the first scheme. Four bits taken for eight
    # are too few and an error; eight taken for four would load, as noise.
    for size in dict.fromkeys((group, -1)):
        some = {name: path for name, path in source.eight_bit.items() if _group_size(source, name) == size}
        schemes += [_scheme(8, size, False, _targets(source, some))] if some else []
    # Engines look for the class of a fused linear before its parts' names: "Linear" would be those of 8 bits too.
    targets = _targets(source, source.linears) if source.eight_bit else ["Linear"]
    schemes.append(_scheme(4, group, not source.settings.zero_point, targets))
    wide = {*source.eight_bit, *source.eight_bit.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{number}": scheme for number, scheme in enumerate(schemes)},
        "ignore": [name for name in source.kept if name not in wide],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # For transformers (5.23), whose other way of loading has no place for packed zero points.
        "dequantize": True,
    }


def tensors(name: str, packed: PackedLinear, *, symmetric: bool) -> dict[str, torch.Tensor]:
    """The tensors of a linear, `weight_zero_point` only where it is not symmetric."""
    codes = unpack(packed.qweight)
    found = {
        f"{name}.weight_packed": pack_rows(codes).t().contiguous(),
        f"{name}.weight_scale": packed.scales.t().contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.shape[::-1], dtype=torch.int64),
    }
    if not symmetric:
        found[f"{name}.weight_zero_point"] = pack_columns(unpack(packed.qzeros)).t().contiguous()
    return found


def eight_bit_tensors(source: Source, full: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor that is no part of a 4-bit linear: the weight of a chosen linear becomes four, others stay.

    Raises:
        NumericsError: scales that float16 cannot hold.
    """
    name = full.removesuffix(".weight")
    if name == full or name not in source.eight_bit:
        return {full: tensor}
    weight = tensor.t() if name in source.sideways else tensor
    size = _group_size(source, name)
    rounded = nearest(name, weight, weight.shape[1] if size == -1 else size)
    return {
        f"{name}.weight_packed": pack_columns(rounded.codes, 8),
        f"{name}.weight_scale": rounded.scales,
        f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        f"{name}.weight_zero_point": pack_rows(rounded.zeros, 8),
    }


def _scheme(bits: int, group: int, symmetric: bool, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _group_size(source: Source, name: str) -> int:
    """Of a linear of 8 bits: the folder's, or -1, the whole row, where that does not divide the row."""
    linear, group = source.model.get_submodule(source.eight_bit[name]), source.settings.group_size
    return group if group != -1 and linear.in_features % group == 0 else -1


def _targets(source: Source, linears: Mapping[str, str]) -> list[str]:
    """What matches `linears`, name on disk -> in the model, by both names, and no other. The experts of a layer are
    matched together, since engines ask for them by names of their own."""
    layers: dict[str, str] = {}
    for layer, module in _experts(source):
        inside = [f"{layer}.{name}" for name, one in module.named_modules() if isinstance(one, nn.Linear)]
        if set(inside) <= set(linears.values()):
            layers |= dict.fromkeys(inside, layer)
    found: dict[str, None] = {}
    for name, path in linears.items():
        layer = layers.get(path, path)
        end = path.removeprefix(layer)
        for one in (name, path) if name.endswith(end) else (path,):
            found[f"re:^{re.escape(one.removesuffix(end))}\\." if end else one] = None
    return list(found)


def _experts(source: Source) -> list[tuple[str, nn.Module]]:
    """The experts of each layer that transformers stacks, with their path."""
    return [(path, one) for path, one in source.model.named_modules() if isinstance(one, UnstackedExperts)]
