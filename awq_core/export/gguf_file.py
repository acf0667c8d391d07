"""GGUF: one file for llama.cpp, with the model's sizes, its tokenizer, and its weights.

    quantized linear, groups of 32, 64, 128 ...    Q4_1: AWQ's codes (`gguf_blocks`)
    quantized linear, other groups, "gguf-fp16"    multiplied out, in float16
    other matrices                                 as they are; norms and biases in float32

Where matrices are multiplied out, llama.cpp's own quantizer can go on: scales and clips are in them. One tensor is in
memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from awq_core.checkpoint.pack import dequantize
from awq_core.errors import CheckpointError, NumericsError
from awq_core.export.card import Card
from awq_core.export.gguf_architectures import Known, add_sizes, known, paired_rows, rope_factors
from awq_core.export.gguf_blocks import BLOCK, BYTES, Fidelity, fits, q4_1
from awq_core.export.gguf_tokenizer import add_tokenizer
from awq_core.export.source import Source
from awq_core.export.staging import put, require, staged
from awq_core.export.writing import small_files
from awq_core.skeleton import build_skeleton, load_config

FILE = "model.gguf"
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
USE = f"```\nllama-cli -m NAME/{FILE}\n```"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's.
        shape: of the array that is written; of bytes where it is quantized.
        kind: of `gguf.GGMLQuantizationType`, by name.
        read: makes that array, and says how near a quantized one came.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], tuple[numpy.ndarray, Fidelity]]

    @property
    def dtype(self) -> numpy.dtype[Any]:
        return numpy.dtype({"Q4_1": "uint8", "F32": "float32"}.get(self.kind, "uint16"))

    @property
    def nbytes(self) -> int:
        return int(numpy.prod(self.shape)) * self.dtype.itemsize


def write(source: Source, out: Path, to: str = "gguf") -> None:
    """Write `source` as `model.gguf`; its card says how near the weights are.

    Args:
        to: "gguf", or "gguf-fp16" for no Q4_1.

    Raises:
        CheckpointError: an architecture, a tensor or a tokenizer that llama.cpp does not have, as far as known here.
        ConfigError: the package gguf is missing.
        NumericsError: scales or weights that float16 cannot hold.
        OutputError: `out` is not empty, holds an unfinished run, or the disk cannot take it.
    """
    require("gguf", "gguf")
    import gguf

    config = load_config(source.folder, trust_remote_code=source.code)
    arch = known(config)
    tensors = plan(source, config, arch, packed=to == "gguf")
    vocabulary = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    with staged(out) as stage:
        writer = gguf.GGUFWriter(stage / FILE, arch.name)
        writer.add_name(source.folder.resolve().name)
        packed = any(tensor.kind == "Q4_1" for tensor in tensors)
        add_sizes(writer, config, arch, vocabulary, packed=packed)
        add_tokenizer(writer, source.folder, vocabulary, trust_remote_code=source.code)
        for tensor in tensors:
            # For a dtype the writer does not know, the type is what counts.
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = Fidelity()
        for tensor in tensors:
            array, fidelity = tensor.read()
            writer.write_tensor_data(array)
            total += fidelity
        writer.close()
        text = f"GGUF, AWQ's 4-bit codes as Q4_1: {total}" if packed else "GGUF, AWQ's weights in 16 bits"
        card = Card(title="AWQ 4-bit, GGUF", tags=("gguf", "awq", "4-bit", "int4"), format=text, use=USE)
        files = small_files(source, None, card)
        put(stage, {name: files[name] for name in ("config.json", "README.md")})


def plan(source: Source, config: Any, arch: Known, *, packed: bool = True) -> list[Tensor]:
    """Every tensor of the file.

    Args:
        packed: Q4_1 where groups allow it.

    Raises:
        CheckpointError: llama.cpp's architecture has no place for a tensor.
    """
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    model = build_skeleton(config, trust_remote_code=source.code)
    shapes = {name: tuple(model.get_submodule(path).weight.shape) for name, path in source.linears.items()}
    found = []
    rows = _Rows(config, arch)
    for name, shape in shapes.items():
        target = _target(names, arch, f"{name}.weight")
        found.append(_linear(source, name, target, shape, rows(target, shape[0]), packed))
    for stored in source.reader.names:
        linear, _, part = stored.rpartition(".")
        unused = stored.endswith("rotary_emb.inv_freq") or (stored == "lm_head.weight" and config.tie_word_embeddings)
        if unused or (linear in shapes and part != "bias"):
            continue
        target = _target(names, arch, stored)
        found.append(_plain(source, stored, target, rows(target, source.reader.shape(stored)[0]), arch))
    factors = rope_factors(config)
    if factors is not None:
        array = factors.numpy()
        found.append(Tensor("rope_freqs.weight", array.shape, "F32", lambda: (array, Fidelity())))
    return found


class _Rows:
    """Which row of a tensor goes where: for most, `None`, they stay."""

    def __init__(self, config: Any, arch: Known) -> None:
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        self.heads = {"attn_q": heads, "attn_k": kv} if arch.paired else {}

    def __call__(self, target: str, rows: int) -> torch.Tensor | None:
        parts = target.split(".")
        heads = self.heads.get(parts[2]) if len(parts) == 4 else None
        return None if heads is None else paired_rows(heads, rows)


def _target(names: Any, arch: Known, stored: str) -> str:
    target: str | None = names.get_name(stored, try_suffixes=(".weight", ".bias"))
    if target is None:
        raise CheckpointError(f"llama.cpp's {arch.name} has no place for {stored}", hint="--to onnx, or scaled-fp16")
    return target


def _linear(
    source: Source, name: str, target: str, shape: tuple[int, ...], rows: torch.Tensor | None, packed: bool
) -> Tensor:
    """A quantized linear."""
    group = shape[1] if source.settings.group_size == -1 else source.settings.group_size

    def blocks() -> tuple[numpy.ndarray, Fidelity]:
        array, fidelity = q4_1(name, source.linear(name))
        return (array if rows is None else array[rows.numpy()]), fidelity

    def unpacked() -> tuple[numpy.ndarray, Fidelity]:
        weight = dequantize(source.linear(name), torch.float16)
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"{name} overflows float16", hint="--to scaled-fp16")
        return _array(weight if rows is None else weight[rows]), Fidelity()

    if packed and fits(group):
        return Tensor(target, (shape[0], shape[1] // BLOCK * BYTES), "Q4_1", blocks)
    return Tensor(target, shape, "F16", unpacked)


def _plain(source: Source, stored: str, target: str, rows: torch.Tensor | None, arch: Known) -> Tensor:
    """A tensor that is not quantized."""
    shape = source.reader.shape(stored)
    dtype = source.reader.dtype(stored) if len(shape) > 1 else torch.float32
    offset = arch.norm_offset if target.endswith("norm.weight") else 0.0

    def read() -> tuple[numpy.ndarray, Fidelity]:
        tensor = (
            source.reader.tensor(stored, dtype=dtype) + offset if offset else source.reader.tensor(stored).to(dtype)
        )
        return _array(tensor if rows is None else tensor[rows]), Fidelity()

    return Tensor(target, shape, TYPES[dtype], read)


def _array(tensor: torch.Tensor) -> numpy.ndarray:
    """The bytes of a tensor, which numpy need not have a type for."""
    tensor = tensor.contiguous()
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.int16).numpy()
