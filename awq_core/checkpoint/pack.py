"""The AWQ "GEMM" layout: how 4-bit codes, zero points and scales of one linear lie in a checkpoint.

A linear computes `y = x @ W.T` with W of shape [out, in]. AWQ stores the transpose, rows along the input, and puts
eight neighbouring output columns into one int32, in an order that an old CUDA kernel found convenient:

    bits of word c     0-3   4-7   8-11  12-15  16-19  20-23  24-27  28-31
    nibble i             0     1     2      3      4      5      6      7
    holds column      8c+0  8c+2  8c+4   8c+6   8c+1   8c+3   8c+5   8c+7

    tensor     dtype           shape              meaning
    qweight    int32           [in, out/8]        codes q, 0..15
    qzeros     int32           [in/group, out/8]  zero points z, 0..15, packed in the same order
    scales     fp16 or bf16    [in/group, out]    s

    W[n, k] = (q[k, n] - z[k // group, n]) * s[k // group, n]        (no offset of one anywhere)

Nibble 7 reaches the sign bit, so words are negative as often as not. Everything below is a loop over the eight
nibbles, each step a whole-tensor operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awq_core.errors import CheckpointError, NumericsError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PER_WORD = 8
_TOGETHER = 1 << 16  # words that a CPU unpacks at a time, so that what lies between stays in its cache


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One quantized linear as it is stored; `checkpoint.format.validate_packed` checks one read from a file.

    Attributes:
        qweight: int32 [in, out/8].
        qzeros: int32 [in/group, out/8].
        scales: floating [in/group, out].
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    @property
    def group_size(self) -> int:
        """Input channels that share one scale; `in` itself where the whole row is one group."""
        return self.qweight.shape[0] // self.qzeros.shape[0]


def _as_codes(values: torch.Tensor, what: str) -> torch.Tensor:
    """`values` as uint8, after proving that each is a whole number from 0 to 15 (NaN fails the comparison too)."""
    codes = values.to(torch.uint8)
    # The second test catches what the first conversion hides: 256 wraps to 0, 3.5 is cut to 3.
    if codes.numel() and (int(codes.max()) > 15 or not torch.equal(codes.to(values.dtype), values)):
        raise ValueError(f"{what} must be whole numbers from 0 to 15")
    return codes


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Put eight 4-bit codes into each int32.

    Args:
        codes: [rows, out], whole numbers 0..15 of any dtype; need not be contiguous.

    Returns:
        int32 [rows, out/8] on the same device.

    Raises:
        CheckpointError: `out` is not a multiple of 8, so the format cannot hold the matrix.
        ValueError: `codes` is not a matrix or holds a value outside 0..15.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes must be a matrix [rows, out], not of shape {tuple(codes.shape)}")
    rows, columns = codes.shape
    if columns % PER_WORD:
        raise CheckpointError(
            f"{columns} output features cannot be packed eight to a word", hint="keep this linear in its own precision"
        )
    blocks = _as_codes(codes, "codes").reshape(rows, columns // PER_WORD, PER_WORD)
    words = torch.zeros(rows, columns // PER_WORD, dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(ORDER):
        words |= blocks[..., column].to(torch.int32) << (4 * nibble)
    return words


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Undo `pack`: int32 [rows, words] to uint8 codes [rows, 8 * words], on the same device.

    Raises:
        ValueError: `words` is not an int32 matrix.
    """
    if words.dim() != 2 or words.dtype != torch.int32:
        raise ValueError(f"expected an int32 matrix, not {words.dtype} of shape {tuple(words.shape)}")
    blocks = torch.empty(*words.shape, PER_WORD, dtype=torch.uint8, device=words.device)
    rows = max(1, _TOGETHER // max(1, words.shape[1]) if words.device.type == "cpu" else words.shape[0])
    for part, block in zip(words.split(rows), blocks.split(rows), strict=True):
        for nibble, column in enumerate(ORDER):
            # The shift repeats the sign bit to the left; the mask drops it.
            block[..., column] = (part >> (4 * nibble)) & 15
    return blocks.flatten(1)


def pack_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    scales_dtype: torch.dtype = torch.float16,
    *,
    name: str = "this linear",
) -> PackedLinear:
    """Pack the quantized weight of one linear, given the way `torch.nn.Linear` holds it.

    Args:
        codes: [out, in], whole numbers 0..15.
        scale: [out, groups], floating; `in` must be a multiple of `groups`.
        zero: [out, groups], whole numbers 0..15.
        scales_dtype: dtype `scales` is stored in; every engine reads float16, most read bfloat16.
        name: what error messages call the linear.

    Returns:
        Contiguous tensors on the device of `codes`.

    Raises:
        CheckpointError: `out` is not a multiple of 8, or the shapes do not belong together.
        NumericsError: a scale is NaN or inf, or becomes so in `scales_dtype`.
        ValueError: a code or zero point outside 0..15.
    """
    out, rows = codes.shape
    groups = scale.shape[-1]
    if scale.shape != zero.shape or scale.shape[0] != out or not groups or rows % groups:
        raise CheckpointError(
            f"{name}: scale {tuple(scale.shape)} and zero {tuple(zero.shape)} do not fit codes {tuple(codes.shape)}",
            hint="both are [out, groups], and groups divides the input features",
        )
    stored = scale.to(scales_dtype)
    if not bool(torch.isfinite(stored).all()):
        overflowed = bool(torch.isfinite(scale).all())
        hint = "store scales as bfloat16" if overflowed else "look for NaN or inf in the weights and the statistics"
        raise NumericsError(f"{name}: scales hold NaN or inf as {scales_dtype}", hint=hint)
    return PackedLinear(
        qweight=pack(codes.t()), qzeros=pack(_as_codes(zero, "zero points").t()), scales=stored.t().contiguous()
    )


def dequantize(packed: PackedLinear, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight an engine computes with: contiguous [out, in], worked out in float32, then cast to `dtype`."""
    groups, out = packed.scales.shape
    codes = unpack(packed.qweight).reshape(groups, packed.group_size, out).float()
    weight = codes.sub_(unpack(packed.qzeros).float().unsqueeze(1)).mul_(packed.scales.float().unsqueeze(1))
    return weight.reshape(-1, out).t().to(dtype).contiguous()
