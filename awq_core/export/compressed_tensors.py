"""compressed-tensors, format "pack-quantized": what llm-compressor writes and transformers, vLLM and SGLang load.

    weight_packed      int32 [out, in/8]        q - 8, stored plus 8: the codes themselves, eight inputs a word
    weight_zero_point  int32 [out/8, groups]    z - 8, stored plus 8, eight outputs a word; none if all are 8
    weight_scale             [out, groups]
    weight_shape       int64 [2]                out, in

The configuration names classes of modules to quantize, and then, one by one, those that are not: `ignore`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.export.card import Card
from awq_core.export.neighbours import pack_columns, pack_rows
from awq_core.export.source import Source
from awq_core.export.writing import write_folder

CARD = Card(
    title="4-bit",
    tags=("compressed-tensors", "awq", "4-bit", "int4"),
    format='compressed-tensors "pack-quantized": 4-bit codes found by AWQ, zero points',
    use="With the package `compressed-tensors` installed:\n\n```python\n"
    'from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("NAME")\n```\n\n'
    "```\nvllm serve NAME\n```",
)


def write(source: Source, out: Path, to: str = "compressed-tensors") -> None:
    """Write `source` as compressed-tensors."""
    symmetric = not source.settings.zero_point
    write_folder(source, out, partial(tensors, symmetric=symmetric), section(source), CARD)


def section(source: Source) -> dict[str, Any]:
    """The `quantization_config`."""
    group = source.settings.group_size
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": not source.settings.zero_point,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": list(source.kept),
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
