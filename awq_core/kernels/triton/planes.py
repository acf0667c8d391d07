# mypy: allow-untyped-defs
"""From nibbles to floating point in one instruction for two weights.

A float of a fixed exponent holds small integers in its low bits: OR a nibble into the bits of 1024.0 and the float is
1024 + q. Subtracting 1024 + z, made the same way from the zero point, leaves the integer q − z, exactly.

    dtype      plane   bits kept of word >> shift   OR with            is
    float16    0, 2    0x000F, shift 0, 8           0x6400 (1024.0)    1024 + q
    float16    1, 3    0x00F0, shift 0, 8           0x5400 (64.0)        64 + q, the nibble stays where it is
    bfloat16   0 .. 3  0x000F, shift 0, 4, 8, 12    0x4300 (128.0)      128 + q

NVIDIA's `lop3` does AND and OR of two words at once: (a & mask) | magic has truth table 0xEA. Triton does not find it,
so it is written out; elsewhere (AMD, the interpreter) the same bits come from Triton's own operators, at about twice
the instructions. Neighbouring words of a register are neighbouring inputs, and bits that a 32-bit shift carries from
one word into the other are masked off.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_of(words, PLANE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    """base + q of one plane of int16 words, in float16 or bfloat16."""
    SHIFT: tl.constexpr = 4 * PLANE if BF16 else 8 * (PLANE // 2)
    MASK: tl.constexpr = 0x00F0 if not BF16 and PLANE % 2 else 0x000F
    MAGIC: tl.constexpr = 0x4300 if BF16 else (0x5400 if PLANE % 2 else 0x6400)
    if ASM:
        PAIR: tl.constexpr = 0x10001  # the same constant for both words of a register
        CODE: tl.constexpr = (
            f"{{ .reg .b32 t; shr.u32 t, $1, {SHIFT}; lop3.b32 $0, t, {MASK * PAIR}, {MAGIC * PAIR}, 0xEA; }}"
        )
        # The dtype must be written out: Triton does not accept a constexpr here.
        if BF16:
            return tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            return tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        bits = ((words >> SHIFT) & MASK) | MAGIC
        return bits.to(tl.bfloat16 if BF16 else tl.float16, bitcast=True)


@triton.jit
def zero_of(zeros, PLANE: tl.constexpr, BF16: tl.constexpr):
    """base + z for the same plane; `zeros` uint8."""
    bits = zeros.to(tl.int16)
    if BF16:
        return (bits | 0x4300).to(tl.bfloat16, bitcast=True)
    elif PLANE % 2:
        return ((bits << 4) | 0x5400).to(tl.float16, bitcast=True)
    else:
        return (bits | 0x6400).to(tl.float16, bitcast=True)
