"""Two quantized folders, weight by weight: how many codes, groups and values differ. No model is built or run.

Both folders are read linear by linear, so memory is two dequantized weights however large the models are. For one
linear with codes q, zero points z, scales s, and weights W = (q - z) · s,

    codes     share of the in · out codes with q_A ≠ q_B
    groups    share of the (in / group) · out groups with s_A ≠ s_B or z_A ≠ z_B
    weight    ‖W_A - W_B‖ / √((‖W_A‖² + ‖W_B‖²) / 2)        0 for equal weights; the same when A and B change places

Codes count steps of their group's range: with different group sizes they cannot be compared, and only `weight` is
given. Activation-aware scales are folded into the weights and, inversely, into what is before them, often a norm. Two
runs that found other scales therefore store other weights for the same function; norms that differ are listed with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from awq_core.checkpoint.eight_bit import widened
from awq_core.checkpoint.foreign import packed_names, read_packed, tensor_names
from awq_core.checkpoint.format import Settings
from awq_core.checkpoint.pack import PackedLinear, dequantize, unpack
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.toolkits import read_settings
from awq_core.errors import CheckpointError
from awq_core.evaluation.perplexity import Progress
from awq_core.model_folder import raw_config, resolve


@dataclass(frozen=True, slots=True)
class LinearDifference:
    """One linear of both folders; the shares are 0..1, and None where group sizes differ.

    Attributes:
        name: its path in the checkpoint.
        parameters: in · out.
        codes, groups, weight: as the module says.
    """

    name: str
    parameters: int
    codes: float | None
    groups: float | None
    weight: float


@dataclass(frozen=True, slots=True)
class WeightComparison:
    """Two quantized folders.

    Attributes:
        linears: those quantized in both, in the order of A's files.
        only_a, only_b: linears quantized in one only.
        others: tensors that neither folder packs, such as norms, whose values differ.
        group_sizes: of A and of B, as their configurations say it.
    """

    linears: tuple[LinearDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    others: tuple[str, ...]
    group_sizes: tuple[int, int]

    @property
    def codes(self) -> float | None:
        """Share of all comparable codes that differ; None where no linear's are."""
        return _mean([(linear.codes, linear.parameters) for linear in self.linears])

    @property
    def groups(self) -> float | None:
        """Share of all comparable groups whose scale or zero point differs; None where no linear's are."""
        return _mean([(linear.groups, linear.parameters) for linear in self.linears])

    @property
    def equal(self) -> bool:
        """Whether both folders hold the same weights in every linear, and the same tensors beside them."""
        same = not any(linear.weight or linear.codes or linear.groups for linear in self.linears)
        return same and not (self.only_a or self.only_b or self.others)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "codes": self.codes, "groups": self.groups, "equal": self.equal}


def compare_weights(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, progress: Progress | None = None
) -> WeightComparison:
    """The weights of two quantized folders.

    Args:
        a, b: local folders or hub names.
        progress: called with (linears done, linears in all) after each.

    Raises:
        CheckpointError: a folder is not quantized to AWQ, or cannot be read; the two are not of one architecture.
        NumericsError: NaN or inf in a tensor.
    """
    folders, settings = (resolve(a), resolve(b)), []
    raws = [raw_config(folder) for folder in folders]
    for folder, raw in zip(folders, raws, strict=True):
        found = read_settings(folder, raw)
        if found is None:
            raise CheckpointError(
                f"{folder}: this model is not quantized", hint="A and B are quantized; the original is --reference"
            )
        settings.append(found)
    kinds = [raw.get("model_type") for raw in raws]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{folders[0]} is a {kinds[0]} and {folders[1]} a {kinds[1]}",
            hint="two folders made from the same model",
        )
    with CheckpointReader(folders[0]) as one, CheckpointReader(folders[1]) as other:
        first, second = widened(one, settings[0]), widened(other, settings[1])
        mine, theirs = packed_names(first.names, settings[0]), packed_names(second.names, settings[1])
        shared = [name for name in mine if name in set(theirs)]
        if not shared:
            raise CheckpointError(
                f"{folders[0]} and {folders[1]} have no quantized linear in common",
                hint="two folders made from the same model",
            )
        linears = []
        for name in shared:
            linears.append(_linear(name, read_packed(first, name, settings[0]), read_packed(second, name, settings[1])))
            if progress:
                progress(len(linears), len(shared))
        return WeightComparison(
            linears=tuple(linears),
            only_a=tuple(name for name in mine if name not in set(theirs)),
            only_b=tuple(name for name in theirs if name not in set(mine)),
            others=tuple(_others(first, settings[0], second)),
            group_sizes=(settings[0].group_size, settings[1].group_size),
        )


def difference(name: str, a: PackedLinear, b: PackedLinear) -> LinearDifference:
    """One linear of both, of the same shape."""
    codes = groups = None
    if a.group_size == b.group_size:
        codes = float((unpack(a.qweight) != unpack(b.qweight)).double().mean())
        steps = (a.scales.float() != b.scales.float()) | (unpack(a.qzeros) != unpack(b.qzeros))
        groups = float(steps.double().mean())
    left, right = dequantize(a), dequantize(b)
    squares = (_square(left) + _square(right)) / 2
    parameters = left.numel()
    weight = (_square(left.sub_(right)) / squares) ** 0.5 if squares else 0.0
    return LinearDifference(name, parameters, codes, groups, weight)


def _linear(name: str, a: PackedLinear, b: PackedLinear) -> LinearDifference:
    shapes = [(one.scales.shape[1], one.qweight.shape[0]) for one in (a, b)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{name} is {shapes[0][0]} x {shapes[0][1]} in one folder and {shapes[1][0]} x {shapes[1][1]} in the other",
            hint="two folders made from the same model",
        )
    return difference(name, a, b)


def _others(a: CheckpointReader, settings: Settings, b: CheckpointReader) -> list[str]:
    """Tensors of both that are no part of a packed linear and differ; one pair in memory at a time."""
    packed = {part for name in packed_names(a.names, settings) for part in tensor_names(a, name, settings)}
    found = []
    for name in a.names:
        if name in packed or name not in b:
            continue
        alike = a.shape(name) == b.shape(name) and a.dtype(name) == b.dtype(name)
        if not alike or not torch.equal(a.tensor(name), b.tensor(name)):
            found.append(name)
    return found


def _square(matrix: torch.Tensor) -> float:
    # Row by row in fp64: a float32 norm of a hundred million numbers has lost its last digits.
    return float(matrix.norm(dim=1).double().square().sum())


def _mean(shares: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(share, weight) for share, weight in shares if share is not None]
    return sum(share * weight for share, weight in known) / sum(weight for _, weight in known) if known else None
