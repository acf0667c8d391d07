"""Every tensor of a GGUF file: its name in llama.cpp, and how it is made of what the folder holds.

    quantized linear, groups of 32, 64, 128 ...    Q4_1: AWQ's codes (`gguf_blocks`)
    quantized linear, other groups, "gguf-fp16"    multiplied out, in float16
    experts                                        the same, one linear of all of a layer's in one tensor
    other matrices                                 as they are; norms, biases and routers in float32

Some rows change places. The rotary embedding of transformers turns rows i and i + d/2 of a head of width d together;
for some architectures llama.cpp turns 2i and 2i + 1, as Meta's first code did. There,  row 2i + j  is  row i + j · d/2.
And where q, k and v are one linear that goes by groups of heads, all of q comes first, then k, then v.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from awq_core.checkpoint.pack import dequantize
from awq_core.errors import CheckpointError, NumericsError
from awq_core.export.gguf_architectures import Known
from awq_core.export.gguf_blocks import BLOCK, BYTES, Fidelity, fits, q4_1
from awq_core.export.gguf_rope import rope_divisors
from awq_core.export.gguf_sizes import kv_heads
from awq_core.export.source import Source

TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
LAYER = re.compile(r"\.layers\.(\d+)\.")
# Beside norms: biases, and what chooses experts.
EXACT = (".bias", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")
# Buffers that older checkpoints hold.
UNUSED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


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


def plan(source: Source, config: Any, arch: Known, *, packed: bool = True) -> list[Tensor]:
    """Every tensor of the file.

    Args:
        packed: Q4_1 where groups allow it.

    Raises:
        CheckpointError: llama.cpp's architecture has no place for a tensor.
    """
    place, order = _places(config, arch), _row_order(config, arch)
    found: dict[str, dict[int | None, Tensor]] = {}
    for stored in _stored(source, config):
        name, expert = stored.removesuffix(".weight"), EXPERT.search(stored)
        target = place(EXPERT.sub(".experts.", stored))
        if name in source.linears:
            tensor = _linear(source, name, target, order, packed)
        elif target == "output.weight" and config.tie_word_embeddings:
            continue
        else:
            tensor = _plain(source, stored, target, order, arch.norm_offset)
        parts, number = found.setdefault(target, {}), int(expert[1]) if expert else None
        if number in parts:
            raise CheckpointError(f"llama.cpp's {arch.name} has one place, {target}, for {stored} and another tensor")
        parts[number] = tensor
    tensors = [parts[None] if None in parts else _stack(parts) for parts in found.values()]
    for name, divisors in rope_divisors(config).items():
        tensors.append(_computed(place(f"{name}.weight"), divisors))
    return tensors


def _stored(source: Source, config: Any) -> list[str]:
    """Names of weights and biases, a quantized linear's weight as if it were one."""
    weights = [f"{name}.weight" for name in source.linears]
    for stored in source.reader.names:
        linear, _, part = stored.rpartition(".")
        layer = LAYER.search(stored)
        # Layers beyond the last predict further tokens; transformers has no place for them either.
        unused = stored.endswith(UNUSED) or (layer is not None and int(layer[1]) >= config.num_hidden_layers)
        if not unused and (linear not in source.linears or part == "bias"):
            weights.append(stored)
    return weights


def _places(config: Any, arch: Known) -> Callable[[str], str]:
    """llama.cpp's name of a stored tensor. Raises CheckpointError where it has none."""
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def place(stored: str) -> str:
        stored = stored.replace("e_score_correction_bias", "e_score_correction.bias")
        # Some checkpoints were saved without the model's head, and lack its prefix.
        for prefix in ("", "transformer.", "model."):
            target: str | None = names.get_name(prefix + stored, try_suffixes=(".weight", ".bias"))
            if target is not None:
                return target
        raise CheckpointError(f"llama.cpp's {arch.name} has no place for {stored}", hint="--to scaled-fp16")

    return place


# For a tensor, by llama.cpp's name, of so many rows: which of them comes in each place. None: they stay.
Order = Callable[[str, int], torch.Tensor | None]


def _row_order(config: Any, arch: Known) -> Order:
    heads, kv = config.num_attention_heads, kv_heads(config)

    def order(target: str, rows: int) -> torch.Tensor | None:
        part = target.split(".")[2] if target.startswith("blk.") else ""
        if arch.paired and part in ("attn_q", "attn_k"):
            return paired_rows(heads if part == "attn_q" else kv, rows)
        return grouped_rows(heads, kv, rows) if arch.grouped and part == "attn_qkv" else None

    return order


def paired_rows(heads: int, rows: int) -> torch.Tensor:
    """int64 `[rows]`: the row of q or k that llama.cpp wants in each place."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def grouped_rows(heads: int, kv: int, rows: int) -> torch.Tensor:
    """int64 `[rows]`: the same for a joined q, k and v, in which each key head stands behind the queries that it
    serves, and its value head behind it."""
    groups = torch.arange(rows).reshape(kv, heads // kv + 2, rows // (heads + 2 * kv))
    return torch.cat([groups[:, :-2].reshape(-1), groups[:, -2].reshape(-1), groups[:, -1].reshape(-1)])


def _linear(source: Source, name: str, target: str, order: Order, packed: bool) -> Tensor:
    """A quantized linear."""
    shape = source.shapes[name]
    rows = order(target, shape[0])
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


def _plain(source: Source, stored: str, target: str, order: Order, norm_offset: float) -> Tensor:
    """A tensor that is not quantized."""
    shape = source.reader.shape(stored)
    turned = stored.removesuffix(".weight") in source.sideways
    shape = shape[::-1] if turned else shape
    exact = target.endswith(EXACT)
    dtype = torch.float32 if exact or len(shape) == 1 else source.reader.dtype(stored)
    offset = norm_offset if target.endswith("norm.weight") else 0.0
    rows = order(target, shape[0])
    if exact and shape[0] == 1:  # a vector, stored as a matrix of one row
        shape = shape[1:]

    def read() -> tuple[numpy.ndarray, Fidelity]:
        tensor = source.reader.tensor(stored)
        tensor = tensor.t() if turned else tensor
        tensor = tensor.float() + offset if offset else tensor
        tensor = tensor if rows is None else tensor[rows]
        return _array(tensor.to(dtype).reshape(shape)), Fidelity()

    return Tensor(target, shape, TYPES[dtype], read)


def _computed(target: str, tensor: torch.Tensor) -> Tensor:
    """One that no checkpoint holds."""
    array = tensor.numpy()
    return Tensor(target, array.shape, "F32", lambda: (array, Fidelity()))


def _stack(parts: dict[int | None, Tensor]) -> Tensor:
    """The experts' tensors as one, `[experts, ...]`. All of it is in memory while it is written.

    Raises:
        CheckpointError: some are quantized and others not.
    """
    experts = [tensor for _, tensor in sorted(parts.items())]
    first = experts[0]
    if any((one.kind, one.shape) != (first.kind, first.shape) for one in experts):
        raise CheckpointError(
            f"some experts of {first.name} are quantized and others not, and llama.cpp has one tensor for all",
            hint="--to scaled-fp16",
        )

    def read() -> tuple[numpy.ndarray, Fidelity]:
        array, total = numpy.empty((len(experts), *first.shape), first.dtype), Fidelity()
        for place, expert in zip(array, experts, strict=True):
            place[...], fidelity = expert.read()
            total += fidelity
        return array, total

    return Tensor(first.name, (len(experts), *first.shape), first.kind, read)


def _array(tensor: torch.Tensor) -> numpy.ndarray:
    """The bytes of a tensor, which numpy need not have a type for."""
    tensor = tensor.contiguous()
    return tensor.numpy() if tensor.dtype == torch.float32 else tensor.view(torch.uint16).numpy()
