"""The packing, against a second implementation made from the words of the format alone, one nibble at a time."""

from __future__ import annotations

import pytest
import torch

from awq_core.checkpoint.pack import PackedLinear, dequantize, pack, pack_linear, unpack
from awq_core.errors import CheckpointError, NumericsError

# The format says "nibble i of word c holds column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]" and, the other way round, "column j
# of the block sits in nibble [0, 4, 1, 5, 2, 6, 3, 7][j]". The slow code below knows the second sentence only.
NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]


def slow_pack(codes: list[list[int]]) -> list[list[int]]:
    """Rows of codes to rows of signed 32-bit words, in plain Python integers."""
    rows = []
    for row in codes:
        words = []
        for start in range(0, len(row), 8):
            word = 0
            for j in range(8):
                word += row[start + j] * 16 ** NIBBLE_OF_COLUMN[j]
            words.append(word - 2**32 if word >= 2**31 else word)
        rows.append(words)
    return rows


def slow_code(words: list[list[int]], row: int, column: int) -> int:
    return (words[row][column // 8] % 2**32) // 16 ** NIBBLE_OF_COLUMN[column % 8] % 16


def random_linear(out: int, in_features: int, group: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """codes [out, in], scale and zero [out, groups], with the extremes 0 and 15 in every group."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group
    codes = torch.randint(0, 16, (out, in_features), generator=generator, dtype=torch.uint8)
    codes[:, ::group], codes[:, group - 1 :: group] = 0, 15
    zero = torch.randint(0, 16, (out, groups), generator=generator, dtype=torch.uint8)
    scale = torch.rand(out, groups, generator=generator) * 0.1 + 1e-3
    return codes, scale, zero


def test_worked_example() -> None:
    # Columns 0..7 hold 0..7: nibbles from low to high are columns 0 2 4 6 1 3 5 7, so the word reads 0x75316420.
    assert pack(torch.arange(8).reshape(1, 8)).tolist() == [[0x75316420]]
    assert pack(torch.tensor([[0, 0, 0, 0, 0, 0, 0, 8]])).tolist() == [[-(2**31)]], "nibble 7 holds the sign bit"
    assert pack(torch.full((1, 8), 15)).tolist() == [[-1]]


@pytest.mark.parametrize(("rows", "out"), [(1, 8), (3, 24), (32, 8), (7, 136), (65, 40)])
def test_pack_agrees_with_the_words_of_the_format(rows: int, out: int) -> None:
    codes = torch.randint(0, 16, (rows, out), generator=torch.Generator().manual_seed(rows * out), dtype=torch.uint8)
    words = pack(codes)
    assert words.dtype == torch.int32 and words.shape == (rows, out // 8)
    assert words.tolist() == slow_pack(codes.tolist())
    assert torch.equal(unpack(words), codes)


@pytest.mark.parametrize("value", range(16))
def test_every_code_in_every_column(value: int) -> None:
    codes = torch.eye(8, dtype=torch.uint8) * value
    assert pack(codes).tolist() == slow_pack(codes.tolist())
    assert torch.equal(unpack(pack(codes)), codes)


def test_every_word_survives() -> None:
    words = torch.randint(-(2**31), 2**31, (64, 9), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    assert torch.equal(pack(unpack(words)), words)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_dtypes_and_strides_do_not_matter(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 16, (24, 5), generator=torch.Generator().manual_seed(2))
    assert pack(codes.to(dtype).t()).tolist() == slow_pack(codes.t().tolist())


@pytest.mark.parametrize("bad", [16, 255, 256, -1, -256, 3.5, float("nan"), float("inf")])
def test_values_that_are_no_code_are_refused(bad: float) -> None:
    codes = torch.zeros(2, 8, dtype=torch.float64 if isinstance(bad, float) else torch.int64)
    codes[1, 3] = bad
    with pytest.raises(ValueError, match="whole numbers from 0 to 15"):
        pack(codes)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CheckpointError, match="12 output features"):
        pack(torch.zeros(4, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="matrix"):
        pack(torch.zeros(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="int32"):
        unpack(torch.zeros(4, 2, dtype=torch.int64))


@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "in_features", "group"), [(8, 32, 32), (24, 96, 32), (40, 192, 64), (16, 384, 128), (24, 80, -1)]
)
def test_linear_round_trip(out: int, in_features: int, group: int, scales_dtype: torch.dtype) -> None:
    size = in_features if group == -1 else group
    codes, scale, zero = random_linear(out, in_features, size)
    packed = pack_linear(codes, scale, zero, scales_dtype)
    assert packed.qweight.shape == (in_features, out // 8) and packed.qweight.dtype == torch.int32
    assert packed.qzeros.shape == (in_features // size, out // 8) and packed.qzeros.dtype == torch.int32
    assert packed.scales.shape == (in_features // size, out) and packed.scales.dtype == scales_dtype
    assert packed.group_size == size
    assert all(t.is_contiguous() for t in (packed.qweight, packed.qzeros, packed.scales))

    weight = dequantize(packed)
    assert weight.shape == (out, in_features) and weight.dtype == torch.float32 and weight.is_contiguous()
    step = scale.to(scales_dtype).float().repeat_interleave(size, 1)
    offset = zero.float().repeat_interleave(size, 1)
    assert torch.equal(weight, (codes.float() - offset) * step)
    assert torch.equal(dequantize(packed, torch.bfloat16), weight.to(torch.bfloat16))


def test_dequantize_agrees_with_the_formula_element_by_element() -> None:
    group, packed = 32, pack_linear(*random_linear(16, 64, 32, seed=3))
    qweight, qzeros, scales = packed.qweight.tolist(), packed.qzeros.tolist(), packed.scales.tolist()
    weight = dequantize(packed).tolist()
    for n in range(16):
        for k in range(64):
            expected = (slow_code(qweight, k, n) - slow_code(qzeros, k // group, n)) * scales[k // group][n]
            # Both factors have at most 11 significant bits, so the product is exact in float32.
            assert weight[n][k] == expected


def test_zero_points_as_floats() -> None:
    codes, scale, zero = random_linear(8, 64, 32)
    assert torch.equal(pack_linear(codes, scale, zero.float()).qzeros, pack_linear(codes, scale, zero).qzeros)
    with pytest.raises(ValueError, match="zero points"):
        pack_linear(codes, scale, zero.float() + 0.5)


def test_scales_that_cannot_be_stored_are_refused_by_name() -> None:
    codes, scale, zero = random_linear(8, 64, 32)
    scale[3, 1] = 70000.0
    with pytest.raises(NumericsError, match=r"mlp\.up.*bfloat16"):
        pack_linear(codes, scale, zero, torch.float16, name="mlp.up")
    pack_linear(codes, scale, zero, torch.bfloat16)
    scale[3, 1] = float("nan")
    with pytest.raises(NumericsError, match="NaN or inf"):
        pack_linear(codes, scale, zero, torch.bfloat16)


@pytest.mark.parametrize(("scale_shape", "zero_shape"), [((8, 3), (8, 3)), ((8, 2), (8, 1)), ((2, 8), (2, 8))])
def test_scales_of_another_shape_are_refused(scale_shape: tuple[int, int], zero_shape: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="do not fit codes"):
        pack_linear(torch.zeros(8, 64), torch.ones(scale_shape), torch.zeros(zero_shape))


def test_packed_linear_is_frozen() -> None:
    packed = pack_linear(*random_linear(8, 32, 32))
    with pytest.raises(AttributeError):
        packed.scales = packed.scales  # type: ignore[misc]
    assert isinstance(packed, PackedLinear)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (7, 10), (64, 3000), (3000, 64)])
def test_unpacking_in_parts_is_unpacking(shape: tuple[int, int]) -> None:
    """Large matrices are unpacked some rows at a time."""
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    nibbles = torch.stack([(words >> 4 * i) & 15 for i in range(8)], dim=-1)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # the nibble that holds each column
    assert torch.equal(unpack(words), nibbles[..., order].to(torch.uint8).flatten(1))
