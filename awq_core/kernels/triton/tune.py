"""Which tile is fastest for a shape, found out on the GPU itself: what `awq tune` does.

The choices are those of `tiles.py`: rows and warps of a program, pipeline stages, the split. Every form is timed with
the split its shape suggests, and the best form with half and with twice that. A tile whose result is not right, or that
does not compile, takes for ever; a default that is beaten by less than the noise stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from awq_core.devices import dtype_name
from awq_core.errors import NumericsError
from awq_core.kernels.triton.layout import BLOCK, ROWS, WORDS, TiledWeight
from awq_core.kernels.triton.tiles import DEFAULTS, MAX_SPLIT, Key, Tile, choose_default, device_class, split_for

FORMS = ((64, 2), (64, 4), (128, 4), (128, 8))  # rows, warps
NOISE = 0.02
ERROR = 1e-2  # of the result, relative; the rounding to bf16 is a fifth of it


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear to tune for: outputs N, inputs K, inputs that share a scale (0: a whole row)."""

    outputs: int
    inputs: int
    group: int


@dataclass(frozen=True, slots=True)
class Best:
    """The best tile for one shape and number of tokens; seconds of it and of the shipped default."""

    key: Key
    tile: Tile
    seconds: float
    default_seconds: float


def tune(
    shape: Shape, dtype: torch.dtype, device: torch.device, timer: Callable[[Callable[[], object]], float]
) -> list[Best]:
    """The best tile for each bucket of tokens.

    Args:
        timer: seconds that a call takes on the device; `cuda_timer` is the real one.

    Raises:
        NumericsError: the shipped tile does not run here, or gives a wrong result.
    """
    kind, multiprocessors = device_class(device)
    weight = random_weight(shape, dtype, device)
    found = []
    for bucket in DEFAULTS[kind]:
        default = choose_default(kind, multiprocessors, shape.outputs, shape.inputs, shape.group, bucket)
        measure = measurer(weight, shape, bucket, dtype, timer)
        tile, seconds, before = search(default, shape, multiprocessors, DEFAULTS[kind][bucket][2], measure)
        if math.isinf(before):
            what = f"{shape.outputs} x {shape.inputs} for {bucket} tokens in {dtype_name(dtype)}"
            raise NumericsError(f"the shipped tile is wrong here: {what}", hint="AWQ_KERNEL=reference")
        found.append(Best((kind, dtype, shape.outputs, shape.inputs, shape.group, bucket), tile, seconds, before))
    return found


def search(
    default: Tile, shape: Shape, multiprocessors: int, stages: int, measure: Callable[[Tile], float]
) -> tuple[Tile, float, float]:
    """The best tile, its seconds, and those of the default."""
    blocks = -(-shape.inputs // BLOCK)
    times: dict[Tile, float] = {}

    def timed(tile: Tile) -> float:
        if tile not in times:
            times[tile] = measure(tile)
        return times[tile]

    before = timed(default)
    for rows, warps in FORMS:
        split = split_for(-(-shape.outputs // rows), blocks, default.tokens, multiprocessors)
        for depth in (stages, stages + 1) if stages < 4 else (stages - 1, stages):
            timed(Tile(rows, default.tokens, split, warps, depth))
    best = min(times, key=timed)
    for split in (best.split // 2, best.split * 2):
        if 1 <= split <= min(MAX_SPLIT, blocks):
            timed(replace(best, split=split))
    best = min(times, key=timed)
    if times[best] > (1 - NOISE) * before:
        best = default
    return best, times[best], before


def measurer(
    weight: TiledWeight, shape: Shape, tokens: int, dtype: torch.dtype, timer: Callable[[Callable[[], object]], float]
) -> Callable[[Tile], float]:
    """Seconds of one tile; infinite where it does not compile, needs too much of the GPU, or computes another thing."""
    from awq_core.kernels.triton.dequantize import dequantize
    from awq_core.kernels.triton.matmul import matmul

    x = torch.randn(tokens, shape.inputs, device=weight.tiles.device).to(dtype)
    want = x.float() @ dequantize(weight, shape.inputs, torch.float32).T

    def measure(tile: Tile) -> float:
        try:
            y = matmul(x, weight, tile=tile).float()
            if not float((y - want).norm()) <= ERROR * float(want.norm()):
                return math.inf
            return timer(lambda: matmul(x, weight, tile=tile))
        except Exception:  # Triton's compilers have many; an error of the device itself comes again with the next call
            return math.inf

    return measure


def random_weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> TiledWeight:
    """Codes and zero points of all kinds; scales that give outputs of about 1."""
    blocks, groups = -(-shape.inputs // BLOCK), 1
    if shape.group:
        groups = blocks * BLOCK // shape.group
    tiles = torch.randint(-(2**15), 2**15, (-(-shape.outputs // ROWS), blocks, ROWS, WORDS), device=device)
    scales = (0.5 + torch.rand(groups, shape.outputs, device=device)) / (6.5 * math.sqrt(shape.inputs))
    zeros = torch.randint(0, 16, (groups, shape.outputs), device=device)
    return TiledWeight(tiles.to(torch.int16), scales.to(dtype), zeros.to(torch.uint8))


def cuda_timer(call: Callable[[], object]) -> float:
    """Median seconds of a call whose weights are not in the GPU's cache."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=25, return_mode="median")) / 1000
