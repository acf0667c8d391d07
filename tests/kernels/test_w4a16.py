"""The C++ kernel, against the exact product of the same codes."""

import pytest
import torch

from awq_core.checkpoint.pack import PackedLinear, dequantize, pack_linear, unpack
from awq_core.kernels.cpu import build, w4a16
from awq_core.kernels.cpu.w4a16 import W4A16Kernel
from awq_core.kernels.reference import ReferenceKernel

WHY_NOT = build.library() if isinstance(build.library(), str) else ""
needs_library = pytest.mark.skipif(bool(WHY_NOT), reason=f"no C++ kernel here: {WHY_NOT}")

ROWS = (0, 1, 2, 3, 5, 16, 17, 33, 64, 100)
# (inputs, outputs, group size): one block and several, odd numbers of blocks, half a block, one group and many.
SHAPES = (
    (96, 8, 32),
    (64, 16, 64),
    (128, 24, 128),
    (256, 40, 64),
    (384, 104, 128),
    (160, 48, 32),
    (80, 16, -1),
    (1000, 24, -1),
    (2048, 32, -1),
    (72, 56, 24),
    (1152, 72, 384),
    (1184, 40, 32),
    (64, 1320, 32),
)
# bf16 results are rounded to 8 bits; the rest is what adding up in fp32 costs.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 2e-6}


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def activations(rows, inputs, dtype, seed=3):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_library
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SHAPES)
def test_codes_lie_as_the_header_says(make, inputs, outputs, group_size, threads):
    """codes[block, t], lane 2c + p, nibble j: column 16 · block + c, input 8t + 2j + p; columns past the last are 0."""
    case, before = make(inputs, outputs, group_size, seed=outputs), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        words = W4A16Kernel().prepare(case.packed, torch.bfloat16)["codes"]
    finally:
        torch.set_num_threads(before)
    assert words.shape == (-(-outputs // 32) * 2, inputs // 8, 32) and words.dtype == torch.int16
    nibbles = torch.stack([(words >> 4 * j) & 15 for j in range(4)], dim=-2)  # [block, t, j, lane]
    lanes = nibbles.unflatten(-1, (16, 2))  # [block, t, j, c, p]
    found = lanes.permute(1, 2, 4, 0, 3).reshape(inputs, -1)
    assert torch.equal(found[:, :outputs].to(torch.uint8), unpack(case.packed.qweight))
    assert not found[:, outputs:].any()


@needs_library
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), SHAPES)
def test_it_is_the_exact_product(make, inputs, outputs, group_size, dtype):
    case, kernel = make(inputs, outputs, group_size, seed=outputs), W4A16Kernel()
    state = kernel.prepare(case.packed, dtype)
    for rows in ROWS:
        x = activations(rows, inputs, dtype)
        got = kernel.linear(x, state)
        assert got.shape == (rows, outputs) and got.dtype == dtype
        if rows:
            assert apart(got, x.double() @ case.weight.T) < TOLERANCE[dtype], rows


@needs_library
@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_it_agrees_with_the_reference_on_random_words(scales, rows):
    """Words drawn bit by bit, as no packing code of ours would make them."""
    generator = torch.Generator().manual_seed(rows)
    qweight, qzeros = (torch.randint(-(2**31), 2**31, (n, 9), generator=generator).int() for n in (192, 3))
    packed = PackedLinear(qweight, qzeros, torch.rand(3, 72, generator=generator).to(scales))
    x, kernel, reference = activations(rows, 192, torch.float32), W4A16Kernel(), ReferenceKernel()
    want = reference.linear(x.double(), reference.prepare(packed, torch.float32))
    assert apart(kernel.linear(x, kernel.prepare(packed, torch.float32)), want) < 2e-6


@needs_library
@pytest.mark.parametrize("zero", range(16))
def test_every_code_meets_every_zero_point(zero):
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 2)
    packed = pack_linear(codes, torch.ones(8, 1), torch.full((8, 1), zero))
    kernel = W4A16Kernel()
    state = kernel.prepare(packed, torch.float32)
    want = (codes.float() - zero).T
    assert torch.equal(kernel.linear(torch.eye(32), state), want), "many rows"
    assert torch.equal(torch.cat([kernel.linear(row[None], state) for row in torch.eye(32)]), want), "row by row"


@needs_library
@pytest.mark.parametrize("value", [0.0, 65504.0, 6e-8, 2**-14])
@pytest.mark.parametrize("rows", [1, 20])
def test_extreme_scales(value, rows):
    """The largest fp16, its smallest denormal and normal, and a step of zero, each beside ordinary ones."""
    generator = torch.Generator().manual_seed(5)
    codes, zeros = (torch.randint(0, 16, size, generator=generator) for size in ((40, 256), (40, 4)))
    steps = torch.rand(40, 4, generator=generator) + 0.5
    steps[::3, 1] = value
    packed = pack_linear(codes, steps, zeros)
    assert float(packed.scales[1, 0]) == pytest.approx(value, rel=0.1)
    x, kernel = activations(rows, 256, torch.float32), W4A16Kernel()
    got = kernel.linear(x, kernel.prepare(packed, torch.float32))
    weight = dequantize(packed, torch.float32).double()
    torch.testing.assert_close(
        got.double(), x.double() @ weight.T, rtol=1e-5, atol=2e-6 * float(weight.abs().max()) * 16
    )


@needs_library
@pytest.mark.parametrize("rows", [1, 7, 19])
def test_every_output_is_written(make, monkeypatch, rows):
    """Memory full of NaN before; and nothing past the last column of the last row."""
    empty = torch.empty

    def poisoned(*sizes, **options):
        return empty(*sizes, **options).fill_(float("nan"))

    case, kernel = make(64, 24, 32), W4A16Kernel()
    state = kernel.prepare(case.packed, torch.bfloat16)
    monkeypatch.setattr(torch, "empty", poisoned)
    assert bool(kernel.linear(activations(rows, 64, torch.bfloat16), state).isfinite().all())
    guarded = empty((rows + 1) * 24, dtype=torch.bfloat16).fill_(7)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: guarded[: rows * 24].view(rows, 24))
    kernel.linear(activations(rows, 64, torch.bfloat16), state)
    assert bool((guarded[rows * 24 :] == 7).all())


@needs_library
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 37, 200])
def test_the_number_of_threads_changes_no_bit(make, rows):
    case, kernel = make(512, 200, 128), W4A16Kernel()
    state, x = kernel.prepare(case.packed, torch.bfloat16), activations(rows, 512, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(kernel.linear(x, state))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_library
def test_a_strided_input_is_read_right(make):
    case, kernel = make(64, 16, 32), W4A16Kernel()
    for dtype in TOLERANCE:
        x = activations(12, 128, dtype)[::2, ::2]
        assert not x.is_contiguous()
        got = kernel.linear(x, kernel.prepare(case.packed, dtype))
        assert apart(got, x.double() @ case.weight.T) < TOLERANCE[dtype]
    x = activations(65, 3, torch.bfloat16).reshape(-1)[1:65].view(1, 64)  # two bytes past an aligned address
    assert apart(kernel.linear(x, kernel.prepare(case.packed, x.dtype)), x.double() @ case.weight.T) < 3e-3


@needs_library
@pytest.mark.parametrize("rows", [3, 30])
def test_a_row_that_is_not_finite_spoils_no_other(make, rows):
    case, kernel = make(128, 32, 64), W4A16Kernel()
    x = activations(rows, 128, torch.bfloat16)
    x[1, 5] = float("nan")
    got = kernel.linear(x, kernel.prepare(case.packed, torch.bfloat16))
    assert bool(got[1].isnan().all()) and bool(torch.cat([got[:1], got[2:]]).isfinite().all())


@needs_library
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(96, 8, 32), (256, 40, 128), (80, 72, -1)])
def test_its_weight_is_the_checkpoints(make, inputs, outputs, group_size, dtype):
    for scales in (torch.float16, torch.bfloat16):
        packed, kernel = make(inputs, outputs, group_size, dtype=scales).packed, W4A16Kernel()
        weight = kernel.dequantize(kernel.prepare(packed, dtype), dtype)
        assert torch.equal(weight, dequantize(packed, dtype))


@pytest.mark.parametrize(
    ("group_size", "scales", "dtype", "words"),
    [
        (32, torch.float16, torch.float64, "float64 activations"),
        (32, torch.float32, torch.bfloat16, "scales in float32"),
        (20, torch.float16, torch.bfloat16, "group size 20 is not a multiple of 8"),
    ],
)
def test_what_it_cannot_run_is_said(make, group_size, scales, dtype, words):
    why = W4A16Kernel().unsupported(make(160, 16, group_size, dtype=scales).packed, dtype)
    assert words in why and "\n" not in why


def test_without_a_library_it_says_why(make, monkeypatch):
    monkeypatch.setattr(build, "library", lambda: "no C++ compiler: install g++")
    kernel = W4A16Kernel()
    assert kernel.unsupported(make(64, 16, 32).packed, torch.bfloat16) == "no C++ compiler: install g++"
    assert kernel.detail() == ""
    w4a16._functions.cache_clear()
    with pytest.raises(RuntimeError, match="install g"):
        w4a16._functions()
