# mypy: allow-untyped-defs
"""fp32 to 16 bits. Triton's interpreter rounds to bf16 wrongly, so there it is done with whole numbers.

A bf16 is the upper half of an fp32. To round to the nearest, and to even where two are as near, add half a unit of the
last place kept, less one bit where that place is even: bits + 0x7FFF + (bits >> 16 & 1).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr, BY_HAND: tl.constexpr):
    """fp32 x in DTYPE; BY_HAND for bf16 in the interpreter."""
    if BY_HAND:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x != x, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)
