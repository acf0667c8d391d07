"""The C++ kernel `w4a16.cpp`: 4-bit weights times bf16 on CPUs with AVX512-BF16, with AMX where the CPU has it.

The C++ multiplies bf16 rows only. Other dtypes are sums of bf16 numbers, so they become more rows of the same product:

    x = x₁ + x₂ (+ x₃),   x₁ = bf16(x),   x₂ = bf16(x − x₁), ...      y = x₁·Wᵀ + x₂·Wᵀ (+ x₃·Wᵀ)

float16 (11 bits) needs two parts of 8 bits, float32 (24 bits) three; at one row the time goes into reading weights, and
more parts cost little. Weights are never rounded, so the error is that of adding up in fp32, and of the output's dtype.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.devices import dtype_name
from awq_core.kernels.cpu import build

PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
COLUMNS = 16  # of one block; outputs are padded to two blocks
GROUP_MULTIPLE = 8  # inputs in one vector


class W4A16Kernel:
    """Every group size that is a multiple of 8, every number of outputs and rows."""

    def unsupported(self, packed: PackedLinear, dtype: torch.dtype) -> str:
        if dtype not in PARTS:
            return f"{dtype_name(dtype)} activations; bfloat16, float16 and float32 only"
        if packed.scales.dtype not in (torch.float16, torch.bfloat16):
            return f"scales in {dtype_name(packed.scales.dtype)}; float16 and bfloat16 only"
        if packed.group_size % GROUP_MULTIPLE:
            return f"group size {packed.group_size} is not a multiple of {GROUP_MULTIPLE}"
        found = build.library()
        return found if isinstance(found, str) else ""

    def detail(self) -> str:
        """What was compiled, for `awq kernels`."""
        found = build.library()
        if isinstance(found, str):
            return ""
        return f"AVX512-BF16{' and AMX' if found.tiles else ''}, {found.compiler}, {found.path}"

    def prepare(self, packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The layout at the top of `w4a16.cpp`, all integers: a later `model.to(dtype)` leaves them alone."""
        inputs, outputs = packed.qweight.shape[0], packed.scales.shape[1]
        words = packed.qweight.contiguous()
        codes = torch.empty(-(-outputs // (2 * COLUMNS)) * 2, inputs // 8, 2 * COLUMNS, dtype=torch.int16)
        _functions().arrange(words.data_ptr(), codes.data_ptr(), outputs, inputs, torch.get_num_threads())
        return {
            "codes": codes,
            "scales": _blocks(packed.scales).view(torch.int16),
            "zeros": _blocks(unpack(packed.qzeros)),
            "shape": torch.tensor([outputs, inputs, int(packed.scales.dtype is torch.bfloat16)]),
        }

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs, inputs, bf16_scales = state["shape"].tolist()
        rows = x.shape[0]
        if x.shape[1] != inputs:  # the C++ would read past the end
            raise ValueError(f"x has {x.shape[1]} columns, the weight {inputs}")
        parts = _parts(x)
        y = torch.empty(parts.shape[0], outputs, dtype=torch.bfloat16 if x.dtype is torch.bfloat16 else torch.float32)
        if y.numel():
            _functions().multiply(
                state["codes"].data_ptr(),
                state["scales"].data_ptr(),
                state["zeros"].data_ptr(),
                parts.data_ptr(),
                y.data_ptr(),
                parts.shape[0],
                outputs,
                inputs,
                inputs // state["scales"].shape[1],
                bf16_scales,
                y.dtype is torch.bfloat16,
                torch.get_num_threads(),
            )
        return y if x.dtype is torch.bfloat16 else y.reshape(PARTS[x.dtype], rows, outputs).sum(0).to(x.dtype)

    def dequantize(self, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight `[out, in]`, worked out in float32 and rounded once."""
        outputs, inputs, bf16_scales = state["shape"].tolist()
        if dtype is torch.bfloat16:
            weight = torch.empty(outputs, inputs, dtype=dtype)
            _functions().dequantize(
                state["codes"].data_ptr(),
                state["scales"].data_ptr(),
                state["zeros"].data_ptr(),
                weight.data_ptr(),
                outputs,
                inputs,
                inputs // state["scales"].shape[1],
                bf16_scales,
                torch.get_num_threads(),
            )
            return weight
        words = state["codes"]
        nibbles = torch.stack([(words >> 4 * j) & 15 for j in range(4)], dim=-2)  # [block, vector, nibble, lane]
        lanes = nibbles.unflatten(-1, (COLUMNS, 2)).permute(0, 3, 1, 2, 4)  # [block, column, vector, nibble, parity]
        scales = state["scales"].view(torch.bfloat16 if bf16_scales else torch.float16).float()
        grouped = lanes.reshape(*lanes.shape[:2], scales.shape[1], -1).float()
        weight = (grouped - state["zeros"].float().transpose(1, 2)[..., None]) * scales.transpose(1, 2)[..., None]
        return weight.reshape(-1, inputs)[:outputs].to(dtype)


def _parts(x: torch.Tensor) -> torch.Tensor:
    """x `[rows, in]` as contiguous bf16 `[parts * rows, in]` that add up to it."""
    if x.dtype is torch.bfloat16:
        return x.contiguous()
    parts, rest = [], x.float()
    for _ in range(PARTS[x.dtype]):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1].float()
    return torch.cat(parts)


def _blocks(values: torch.Tensor) -> torch.Tensor:
    """`[groups, out]` -> `[blocks, groups, 16]`, with zeros up to whole pairs of blocks."""
    padded = functional.pad(values, (0, -values.shape[1] % (2 * COLUMNS)))
    return padded.reshape(padded.shape[0], -1, COLUMNS).transpose(0, 1).contiguous()


class Functions(NamedTuple):
    """Those of `w4a16.cpp`, with their arguments declared."""

    multiply: Callable[..., None]
    dequantize: Callable[..., None]
    arrange: Callable[..., None]


@functools.cache
def _functions() -> Functions:
    found = build.library()
    if isinstance(found, str):
        raise RuntimeError(f"the C++ kernel is not there: {found}")
    pointer, size, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    made = Functions(found.functions.awq_w4a16, found.functions.awq_w4_dequantize, found.functions.awq_w4_arrange)
    signatures = (
        [*[pointer] * 5, *[size] * 4, *[flag] * 3],
        [*[pointer] * 4, *[size] * 3, *[flag] * 2],
        [*[pointer] * 2, *[size] * 2, flag],
    )
    for function, signature in zip(made, signatures, strict=True):
        function.argtypes, function.restype = signature, None  # type: ignore[attr-defined]
    return made
