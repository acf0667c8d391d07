"""Q4_1, the 4-bit type of llama.cpp that can hold AWQ's numbers: 32 neighbouring inputs, a step and a minimum.

    AWQ    w = (q - z) · s             Q4_1    w = q · d + m        d = s, m = -s · z

    a block of 32: d float16, m float16, 16 bytes of codes; byte j holds input j in its lower half, j + 16 in the upper

The codes are AWQ's own, and so is the step where float16 holds it. The product s · z may need more than float16's 11
bits: m is then the nearest float16, which moves all 32 weights by the same amount, less than 1/2000 of m (unless m is
tiny, where float16 has fewer bits).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.errors import NumericsError

BLOCK = 32
BYTES = 2 + 2 + BLOCK // 2


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near Q4_1 came.

    Attributes:
        blocks: of 32 weights.
        rounded: those whose step or minimum float16 does not hold exactly.
        worst: the largest difference of a weight, in steps.
    """

    blocks: int = 0
    rounded: int = 0
    worst: float = 0.0

    def __add__(self, other: Fidelity) -> Fidelity:
        return Fidelity(self.blocks + other.blocks, self.rounded + other.rounded, max(self.worst, other.worst))

    def __str__(self) -> str:
        if not self.rounded:
            return "every weight is exact"
        return (
            f"{self.rounded / self.blocks:.0%} of the blocks have a minimum that float16 rounds;"
            f" no weight is off by more than {self.worst:.1%} of a step"
        )


def fits(group: int) -> bool:
    """Whether groups of this size are made of blocks."""
    return group % BLOCK == 0


def q4_1(name: str, packed: PackedLinear) -> tuple[numpy.ndarray, Fidelity]:
    """A linear as Q4_1: uint8 `[out, in / 32 · 20]`, and how near that is.

    Raises:
        NumericsError: a step or a minimum is too large for float16.
    """
    codes = unpack(packed.qweight).t()
    out = len(codes)
    repeat = packed.group_size // BLOCK
    step = packed.scales.t().float()
    least = -step * unpack(packed.qzeros).t().float()
    d, m = step.half(), least.half()
    if not bool(torch.isfinite(d).all() and torch.isfinite(m).all()):
        raise NumericsError(f"{name}: its scales overflow float16, and Q4_1 has no other", hint="--to scaled-fp16")
    # Over the 16 codes the difference q · (d - s) + (m + s · z) is largest at one end.
    off = torch.maximum((m.float() - least).abs(), (15 * (d.float() - step) + m.float() - least).abs())
    rounded = int((off > 0).sum()) * repeat
    worst = float((off / step.abs().clamp_min(torch.finfo(torch.float32).tiny)).max()) if rounded else 0.0

    halves = codes.reshape(out, -1, 2, BLOCK // 2)
    blocks = torch.empty(out, halves.shape[1], BYTES, dtype=torch.uint8)
    blocks[..., :2] = d.repeat_interleave(repeat, 1).contiguous().view(torch.uint8).reshape(out, -1, 2)
    blocks[..., 2:4] = m.repeat_interleave(repeat, 1).contiguous().view(torch.uint8).reshape(out, -1, 2)
    blocks[..., 4:] = halves[:, :, 0] | halves[:, :, 1] << 4
    return blocks.reshape(out, -1).numpy(), Fidelity(out * halves.shape[1], rounded, worst)
