"""The oracle of every kernel, against loops over single nibbles and products."""

import pytest
import torch

from awq_core.checkpoint.pack import PackedLinear
from awq_core.kernels.reference import ReferenceKernel

# Where column c of eight lies in its word: the table of the AWQ format, written down once more.
NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


def nibble(words: list[list[int]], row: int, column: int) -> int:
    return (words[row][column // 8] >> (4 * NIBBLE_OF_COLUMN[column % 8])) % 16


def plain(x: list[list[float]], packed: PackedLinear) -> list[list[float]]:
    """y = x · Wᵀ, W[o, i] = (q - z) · s, one number at a time."""
    codes, zeros, scales = packed.qweight.tolist(), packed.qzeros.tolist(), packed.scales.tolist()
    length = len(codes) // len(zeros)
    outputs = len(scales[0])
    result = []
    for row in x:
        sums = []
        for out in range(outputs):
            total = 0.0
            for i, value in enumerate(row):
                group = i // length
                total += value * (nibble(codes, i, out) - nibble(zeros, group, out)) * scales[group][out]
            sums.append(total)
        result.append(sums)
    return result


@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(64, 16, 32), (64, 8, 64), (96, 24, -1), (32, 8, 32)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_the_plain_sum(make, inputs, outputs, group_size, dtype):
    packed = make(inputs, outputs, group_size, dtype=dtype).packed
    x = torch.randn(3, inputs, generator=torch.Generator().manual_seed(1))
    kernel = ReferenceKernel()
    assert kernel.unsupported(packed, torch.float32) == ""
    got = kernel.linear(x, kernel.prepare(packed, torch.float32))
    want = torch.tensor(plain(x.tolist(), packed), dtype=torch.float64)
    assert got.dtype == torch.float32 and got.shape == (3, outputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_words_drawn_at_random_are_any_codes():
    """Negative words too: the highest nibble holds the sign bit."""
    generator = torch.Generator().manual_seed(2)
    qweight, qzeros = (torch.randint(-(2**31), 2**31, (n, 2), generator=generator).int() for n in (32, 1))
    packed = PackedLinear(qweight, qzeros, torch.rand(1, 16, generator=generator).half())
    assert bool((qweight < 0).any()) and bool((qweight > 0).any())
    x = torch.randn(2, 32, generator=generator)
    kernel = ReferenceKernel()
    want = torch.tensor(plain(x.tolist(), packed), dtype=torch.float64)
    torch.testing.assert_close(
        kernel.linear(x, kernel.prepare(packed, torch.float32)).double(), want, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_it_computes_in_the_dtype_of_its_input(make, dtype, tokens):
    case = make(64, 16, 32)
    kernel = ReferenceKernel()
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = kernel.linear(x, kernel.prepare(case.packed, dtype))
    assert got.dtype == dtype and got.shape == (tokens, 16)
    want = x.double() @ case.weight.T
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()) if tokens else 0)


def test_memory_stays_at_four_bits(make):
    packed = make(128, 32, 32).packed
    state = ReferenceKernel().prepare(packed, torch.float32)
    assert sum(tensor.nbytes for tensor in state.values()) == 128 * 32 // 2 + 4 * 32 // 2 + 4 * 32 * 2
