"""Linears of 8 bits in compressed-tensors' "pack-quantized", shown as the 16-bit weights they stand for.

    weight_packed      int32 [out, in/4]        q - 128, stored plus 128: four inputs a word, lowest bits first
    weight_zero_point  int32 [out/4, groups]    z - 128, stored plus 128, four outputs a word; none if all are 128
    weight_scale             [out, groups]      s
    weight_shape       int64 [2]                out, in

    W[o, i] = (q[o, i] - z[o, g]) * s[o, g]     in float32, rounded to the dtype of s, as compressed-tensors does

AWQ has no such linears, so one is a kept linear here: `widened` shows a checkpoint as if it held `<linear>.weight`, and
whatever reads it needs not know. Which linears have 8 bits their words say, since `weight_shape` has the inputs; that
there are such linears the configuration says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from awq_core.checkpoint.foreign import AGAIN, expect, in_order
from awq_core.checkpoint.format import Settings
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.view import ReaderView, Shown
from awq_core.errors import CheckpointError, NumericsError
from awq_core.skeleton import checkpoint_names, transposed_names

PER_WORD = 4
MIDDLE = 128
MARK = ".weight_packed"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")


@dataclass(frozen=True, slots=True)
class Wide:
    """One linear of 8 bits: its shape, and whether its 16-bit weight lies on disk as `[in, out]`."""

    out: int
    rows: int
    turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of the 16-bit weight on disk."""
        return (self.rows, self.out) if self.turned else (self.out, self.rows)


def widened(
    reader: CheckpointReader, settings: Settings | None, model: PreTrainedModel | None = None
) -> CheckpointReader:
    """`reader`, or a view of it that shows a 16-bit weight where the checkpoint has a linear of 8 bits.

    Args:
        model: says which weights lie on disk as `[in, out]` where they are not quantized; None: none do.

    Raises:
        CheckpointError: a `weight_shape` is missing or no pair of numbers.
    """
    if settings is None or not settings.eight_bit:
        return reader
    packed = [name.removesuffix(MARK) for name in reader.names if name.endswith(MARK)]
    places = {} if model is None else checkpoint_names(model, tuple(f"{name}.weight" for name in packed))
    turned = {places[name].removesuffix(".weight") for name in transposed_names(model) & set(places)} if model else ()
    shown: dict[str, Shown] = {}
    for name in packed:
        shape = reader.tensor(f"{name}.weight_shape")
        expect(name, "weight_shape", shape, (2,))
        out, rows = (int(size) for size in shape.tolist())
        words = reader.shape(f"{name}{MARK}")[-1]
        if words == -(-rows // PER_WORD) != -(-rows // 8):
            shown[f"{name}.weight"] = _shown(reader, name, Wide(out, rows, name in turned), settings)
    parts = {f"{weight.removesuffix('weight')}{part}": weight for weight in shown for part in PARTS}
    return ReaderView(reader, dict.fromkeys(parts.get(name, name) for name in reader.names), shown)


def _shown(reader: CheckpointReader, name: str, one: Wide, settings: Settings) -> Shown:
    def make(dtype: torch.dtype | None, check_finite: bool) -> torch.Tensor:
        weight = decode(reader, name, one, settings).to(dtype)
        if check_finite and not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"{name}.weight overflows {weight.dtype}", hint="use bfloat16 or float32")
        return (weight.t() if one.turned else weight).contiguous()

    return Shown(one.shape, reader.dtype(f"{name}.weight_scale"), make)


def decode(reader: CheckpointReader, name: str, one: Wide, settings: Settings) -> torch.Tensor:
    """The weight of a linear, `[out, in]` in the dtype of its scales.

    Raises:
        CheckpointError: a tensor is missing or does not fit; groups that the configuration does not name; act-order.
        NumericsError: a scale is NaN or inf.
    """
    parts = {part: reader.tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in reader}
    if "weight_scale" not in parts:
        raise CheckpointError(f"{name}.weight_scale is missing", hint=AGAIN)
    words, scales, stored = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    expect(name, "weight_packed", words, (one.out, -(-one.rows // PER_WORD)), torch.int32)
    expect(name, "weight_scale", scales, (one.out, None))
    groups = scales.shape[1]
    in_order(name, parts.get("weight_g_idx"), one.rows, groups)
    fits = [zeros for size, zeros in settings.eight_bit if (one.rows if size == -1 else size) * groups == one.rows]
    if (stored is not None) not in fits:
        zeros = "no" if stored is None else "with"
        raise CheckpointError(
            f"{name} has {groups} groups in {one.rows} input features, {zeros} zero points, "
            "and config.json names no such group of 8 bits",
            hint=AGAIN,
        )
    codes = unpacked(words)[:, : one.rows].unflatten(1, (groups, -1)).float()
    if stored is None:
        codes -= MIDDLE
    elif stored.dtype == torch.int8:  # not packed before compressed-tensors' pull request 296
        expect(name, "weight_zero_point", stored, (one.out, groups))
        codes -= (stored.float() + MIDDLE).unsqueeze(-1)
    else:
        expect(name, "weight_zero_point", stored, (-(-one.out // PER_WORD), groups), torch.int32)
        codes -= unpacked(stored.t())[:, : one.out].t().float().unsqueeze(-1)
    return codes.mul_(scales.float().unsqueeze(-1)).flatten(1).to(scales.dtype)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, n] to uint8 [rows, 4n]: four neighbouring columns a word, the first in its lowest bits."""
    return torch.stack([(words >> 8 * i & 255).to(torch.uint8) for i in range(PER_WORD)], -1).flatten(1)
