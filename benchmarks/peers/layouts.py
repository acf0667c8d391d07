"""From an exported checkpoint back to plain weights, in fp32 and in nobody's code but this.

    layout              recognised by        codes of a linear [out, in], 4 bits
    AWQ "gemm"          qweight [in, out/8]   8 columns of the transpose a word, in the order 0 2 4 6 1 3 5 7
    GPTQ                qweight [in/8, out]   8 rows of the transpose a word; zero points stored less one in version 1
    compressed-tensors  weight_packed         8 columns a word; signed, stored plus 8
    Model Optimizer     a weight in uint8     2 rows a byte; signed, two's complement, symmetric

Each function returns (q - z) * s, [out, in].
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# What a layout stores beside the codes of a linear; used up when the weight is made.
BESIDE = (".scales", ".qzeros", ".g_idx", ".weight_scale", ".weight_zero_point", ".weight_shape", ".pre_quant_scale")


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of every safetensors file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder.name}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def plain_weights(folder: Path) -> Tensors:
    """A checkpoint as an unquantized one would be: fp32, under the model's own names."""
    tensors = read_tensors(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    plain: Tensors = {}
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind == "qweight":
            columns = tensors[f"{linear}.scales"].shape[1]
            if tensor.shape[1] == columns:
                plain[f"{linear}.weight"] = gptq(linear, tensors, settings)
            else:
                plain[f"{linear}.weight"] = awq_gemm(linear, tensors)
        elif kind == "weight_packed":
            plain[f"{linear}.weight"] = compressed_tensors(linear, tensors)
        elif kind == "weight" and tensor.dtype == torch.uint8:
            plain[name] = model_optimizer(linear, tensors)
        elif not name.endswith(BESIDE):
            plain[name] = tensor.float()
    return plain


def nibbles(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [rows, n] to int32 [rows, 8n]: the i-th nibble of a word, from the low end, is its column order[i]."""
    columns = torch.empty(*words.shape, 8, dtype=torch.int32)
    for position, column in enumerate(order):
        columns[..., column] = words >> (4 * position) & 15
    return columns.flatten(1)


def awq_gemm(linear: str, tensors: Tensors) -> torch.Tensor:
    codes, zeros = (nibbles(tensors[f"{linear}.{name}"], AWQ_ORDER) for name in ("qweight", "qzeros"))
    scales = tensors[f"{linear}.scales"].float()
    group = torch.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    return ((codes - zeros[group]) * scales[group]).t().contiguous()


def gptq(linear: str, tensors: Tensors, settings: dict[str, Any]) -> torch.Tensor:
    codes = nibbles(tensors[f"{linear}.qweight"].t().contiguous())  # [out, in]
    version_1 = settings.get("checkpoint_format", "gptq") == "gptq"
    zeros = (nibbles(tensors[f"{linear}.qzeros"]) + version_1) & 15  # [groups, out]
    scales = tensors[f"{linear}.scales"].float()
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[0])
    group = tensors.get(f"{linear}.g_idx", group).long()
    return (codes - zeros[group].t()) * scales[group].t()


def compressed_tensors(linear: str, tensors: Tensors) -> torch.Tensor:
    rows, columns = tensors[f"{linear}.weight_shape"].tolist()
    codes = nibbles(tensors[f"{linear}.weight_packed"])[:, :columns]
    scales = tensors[f"{linear}.weight_scale"].float()  # [out, groups]
    group = torch.arange(columns) // (columns // scales.shape[1])
    packed = tensors.get(f"{linear}.weight_zero_point")  # [out/8, groups]: packed down the rows
    zeros = nibbles(packed.t().contiguous())[:, :rows].t() if packed is not None else torch.full(scales.shape, 8)
    # Codes and zero points are both stored plus 8, so the eights cancel.
    return (codes - zeros[:, group]) * scales[:, group]


def model_optimizer(linear: str, tensors: Tensors) -> torch.Tensor:
    stored = tensors[f"{linear}.weight"].int()
    codes = torch.stack([stored & 15, stored >> 4], 1).flatten(0, 1)  # rows 2r and 2r+1 share a byte
    scales = tensors[f"{linear}.weight_scale"].float()
    group = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    weight = (codes - 16 * (codes > 7)) * scales[:, group]
    # What no norm could absorb multiplies the input when the model runs; here, the columns.
    return weight * tensors[f"{linear}.pre_quant_scale"].float() if f"{linear}.pre_quant_scale" in tensors else weight
