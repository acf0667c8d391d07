"""How toolkits name and lay out the integers of a 4-bit linear, and the same integers as a `PackedLinear`.

    layout           tensors of `<linear>`                     eight neighbours in an int32, lowest bits first
    gemm             qweight qzeros scales                     columns of qweight, in the order of `checkpoint.pack`
    gptq, gptq_v2    qweight [in/8, out]    qzeros [groups, out/8]     rows of qweight, columns of qzeros
                     scales [groups, out]   g_idx [in], optional       "gptq" stores each zero point less one
    pack-quantized   weight_packed [out, in/8]   weight_zero_point [out/8, groups]    columns; rows of the zero points
                     weight_scale [out, groups]  weight_shape [2]      signed numbers, stored plus 8

In every one of them W[o, i] = (q[o, i] - z[o, g]) * s[o, g] with g = i // group and q, z in 0..15 (compressed-tensors'
q and z are both 8 less, which cancels), so a conversion moves bits and computes nothing: the weight is the same number
for number. What has no such form is refused: columns grouped out of order (act-order), zero points outside 0..15.

The layout is the one the configuration names, see `checkpoint.toolkits`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from awq_core.checkpoint.format import SCALE_DTYPES, Settings, validate_packed
from awq_core.checkpoint.pack import PER_WORD, PackedLinear, pack, unpack
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError

Parts = dict[str, torch.Tensor]
MIDDLE = 8
_TOGETHER = 128  # rows turned at a time: of a big matrix only these are unpacked
AGAIN = "is config.json the one these weights were made with?"


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout.

    Attributes:
        parts: last names of the tensors a linear has; where the first is, the linear is quantized.
        optional: of those it may have.
        convert: (name of the linear, its tensors by last name, settings) -> PackedLinear.
    """

    parts: tuple[str, ...]
    convert: Callable[[str, Parts, Settings], PackedLinear]
    optional: tuple[str, ...] = ()


def layout_of(settings: Settings | None) -> Layout:
    """The layout the configuration names; this project's own where it names none."""
    return LAYOUTS["gemm" if settings is None else settings.version]


def packed_names(names: Iterable[str], settings: Settings | None) -> list[str]:
    """The quantized linears among tensor names, in their order."""
    mark = "." + layout_of(settings).parts[0]
    return [name.removesuffix(mark) for name in names if name.endswith(mark)]


def logical_names(names: Iterable[str], settings: Settings | None) -> dict[str, bool]:
    """Names as an unquantized checkpoint would have them -> whether the weight is packed."""
    layout = layout_of(settings)
    logical: dict[str, bool] = {}
    for name in names:
        base, _, leaf = name.rpartition(".")
        if leaf == layout.parts[0]:
            logical[f"{base}.weight"] = True
        elif leaf not in layout.parts and leaf not in layout.optional:
            logical[name] = False
    return logical


def tensor_names(reader: CheckpointReader, name: str, settings: Settings | None) -> list[str]:
    """Full names of the tensors of one quantized linear."""
    layout = layout_of(settings)
    optional = [part for part in layout.optional if f"{name}.{part}" in reader]
    return [f"{name}.{part}" for part in (*layout.parts, *optional)]


def read_packed(
    reader: CheckpointReader,
    name: str,
    settings: Settings,
    *,
    shape: tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> PackedLinear:
    """One quantized linear of a checkpoint in any layout; nothing else is in memory meanwhile.

    Args:
        name: its path in the checkpoint.
        shape: (out, in) the model wants; default: whatever the tensors make.

    Raises:
        CheckpointError: a tensor is missing or does not fit, or the linear has no exact AWQ form.
        NumericsError: a scale is NaN or inf.
    """
    layout = layout_of(settings)
    full = tensor_names(reader, name, settings)
    parts = {one.rpartition(".")[2]: reader.tensor(one, device=device) for one in full}
    packed = layout.convert(name, parts, settings)
    rows, columns = packed.qweight.shape[0], packed.qweight.shape[1] * PER_WORD
    if settings.version != "gemm" and shape not in (None, (columns, rows)):
        raise CheckpointError(f"{name} is {columns} x {rows}, the model needs {shape[0]} x {shape[1]}", hint=AGAIN)
    columns, rows = shape or (columns, rows)
    validate_packed(name, packed, rows, columns, _group_size(name, packed, rows, settings))
    if not settings.zero_point and not bool((unpack(packed.qzeros) == MIDDLE).all()):
        raise CheckpointError(
            f"{name}: zero points that are not {MIDDLE}, though config.json says symmetric", hint=AGAIN
        )
    return packed


def _group_size(name: str, packed: PackedLinear, rows: int, settings: Settings) -> int:
    """The declared group size that gives this many groups."""
    declared = (settings.group_size, *settings.other_group_sizes)
    groups = packed.qzeros.shape[0]
    for size in declared:
        if (rows if size == -1 else size) * groups == rows:
            return size
    if settings.version == "gemm":
        return settings.group_size  # the shape of qzeros is what will be named
    raise CheckpointError(
        f"{name} has {groups} groups in {rows} input features, config.json says groups of {declared[0]}", hint=AGAIN
    )


def _gemm(name: str, parts: Parts, settings: Settings) -> PackedLinear:
    for part, tensor in parts.items():
        expect(name, part, tensor, (None, None))
    return PackedLinear(parts["qweight"], parts["qzeros"], parts["scales"])


def _gptq(name: str, parts: Parts, settings: Settings, *, stored_less: int) -> PackedLinear:
    words, scales = parts["qweight"], parts["scales"]
    expect(name, "scales", scales, (None, None))
    groups, columns = scales.shape
    expect(name, "qweight", words, (None, columns), torch.int32)
    expect(name, "qzeros", parts["qzeros"], (groups, -(-columns // PER_WORD)), torch.int32)
    rows = words.shape[0] * PER_WORD
    in_order(name, parts.get("g_idx"), rows, groups)
    zeros = _neighbours(parts["qzeros"])[:, :columns]
    if stored_less and bool((zeros == 15).any()):
        # 15 is either a zero point of 16, or one of 0 that borrowed from its neighbour: tools disagree.
        raise CheckpointError(
            f"{name}: a zero point stored as 15, which the layout 'gptq' leaves open", hint="export it as 'gptq_v2'"
        )
    codes = torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in range(PER_WORD)], 1).flatten(0, 1)
    return PackedLinear(pack(codes), pack(zeros + stored_less), _scales(name, scales))


def _pack_quantized(name: str, parts: Parts, settings: Settings) -> PackedLinear:
    words, scales = parts["weight_packed"], parts["weight_scale"]
    expect(name, "weight_shape", parts["weight_shape"], (2,))
    out, rows = (int(size) for size in parts["weight_shape"].tolist())
    expect(name, "weight_packed", words, (out, -(-rows // PER_WORD)), torch.int32)
    expect(name, "weight_scale", scales, (out, None))
    groups = scales.shape[1]
    in_order(name, parts.get("weight_g_idx"), rows, groups)
    zeros = torch.full((out, groups), MIDDLE, dtype=torch.uint8, device=scales.device)
    stored = parts.get("weight_zero_point")
    if stored is None and settings.zero_point:
        raise CheckpointError(f"{name}.weight_zero_point is missing, and config.json says asymmetric", hint=AGAIN)
    if stored is not None and stored.dtype == torch.int8:  # not packed before compressed-tensors' pull request 296
        expect(name, "weight_zero_point", stored, (out, groups))
        if bool(((stored < -MIDDLE) | (stored >= MIDDLE)).any()):
            raise CheckpointError(f"{name}.weight_zero_point has zero points outside -8 to 7", hint=AGAIN)
        zeros = (stored + MIDDLE).to(torch.uint8)
    elif stored is not None:
        expect(name, "weight_zero_point", stored, (-(-out // PER_WORD), groups), torch.int32)
        zeros = _neighbours(stored.t())[:, :out].t()
    if out % PER_WORD:
        raise CheckpointError(
            f"{name}: {out} output features cannot be packed eight to a word", hint="keep this linear when quantizing"
        )
    qweight = torch.empty(rows, out // PER_WORD, dtype=torch.int32, device=words.device)
    for part, turned in zip(words.split(_TOGETHER), qweight.split(_TOGETHER // PER_WORD, 1), strict=True):
        turned.copy_(pack(_neighbours(part)[:, :rows].t()))
    return PackedLinear(qweight, pack(zeros.t()), _scales(name, scales.t().contiguous()))


LAYOUTS = {
    "gemm": Layout(("qweight", "qzeros", "scales"), _gemm),
    "gptq": Layout(("qweight", "qzeros", "scales"), partial(_gptq, stored_less=1), ("g_idx",)),
    "gptq_v2": Layout(("qweight", "qzeros", "scales"), partial(_gptq, stored_less=0), ("g_idx",)),
    "pack-quantized": Layout(
        ("weight_packed", "weight_scale", "weight_shape"), _pack_quantized, ("weight_zero_point", "weight_g_idx")
    ),
}


def _neighbours(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n] to uint8 [rows, 8n]: eight neighbouring columns a word, the first in its lowest bits."""
    return torch.stack([(words >> 4 * i & 15).to(torch.uint8) for i in range(PER_WORD)], -1).flatten(1)


def expect(
    name: str, part: str, tensor: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> None:
    """Refuse a tensor of another shape, in which None is any size, or of another dtype."""
    found = tuple(tensor.shape)
    fits = len(found) == len(shape) and all(
        want is None or size == want for size, want in zip(found, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise CheckpointError(f"{name}.{part} has shape {found}, expected ({wanted})", hint=AGAIN)
    if dtype is not None and tensor.dtype != dtype:
        raise CheckpointError(f"{name}.{part} is {tensor.dtype}, expected {dtype}", hint=AGAIN)


def in_order(name: str, order: torch.Tensor | None, rows: int, groups: int) -> None:
    """Refuse input columns that are not grouped with their neighbours; `order` [in] is the group of each."""
    if rows < 1 or groups < 1 or rows % groups:
        raise CheckpointError(f"{name}: {rows} input features cannot be {groups} groups of one size", hint=AGAIN)
    if order is not None:
        expected = torch.arange(rows, device=order.device) // (rows // groups)
        if tuple(order.shape) != (rows,) or not torch.equal(order.long(), expected):
            raise CheckpointError(
                f"{name}: its columns are grouped out of order (act-order, desc_act), which AWQ cannot hold",
                hint="quantize the original model instead, or without act-order",
            )


def _scales(name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales in a dtype AWQ stores: as they are, or float32 that loses nothing in 16 bits."""
    if scales.dtype in SCALE_DTYPES or not scales.is_floating_point():
        return scales  # integers are refused with the shapes
    for dtype in SCALE_DTYPES:
        short = scales.to(dtype)
        if torch.equal(short.to(scales.dtype), scales):
            return short
    raise CheckpointError(
        f"{name}: scales in {scales.dtype} that 16 bits cannot hold exactly", hint="quantize a model in bfloat16"
    )
