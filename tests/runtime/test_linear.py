"""`QuantLinear` as a module: shapes, dtypes, and agreement with the weights it stands for."""

import copy

import pytest
import torch

from awq_core.checkpoint.pack import dequantize, pack_linear
from awq_core.kernels.cpu import build
from awq_core.runtime.linear import QuantLinear, fake_quantized


def packed(inputs=64, outputs=32, groups=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator)
    scales = 0.01 + 0.05 * torch.rand(outputs, groups, generator=generator)
    return pack_linear(codes.to(torch.uint8), scales, zeros)


def near(got, want, tolerance):
    assert got.shape == want.shape
    assert float((got.double() - want.double()).norm()) <= tolerance * float(want.double().norm())


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [
        (torch.float32, "reference", 1e-5),
        (torch.bfloat16, "int4pack", 1e-2),
        (torch.bfloat16, "cpu", 5e-3),
        (torch.float16, "cpu", 1e-3),
        (torch.float32, "cpu", 1e-5),
    ],
)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64), (1, 1, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_any_number_of_dimensions(dtype, backend, tolerance, shape, bias, monkeypatch):
    if backend == "cpu" and isinstance(build.library(), str):
        pytest.skip(f"no C++ kernel here: {build.library()}")
    monkeypatch.setenv("AWQ_KERNEL", backend)
    values = torch.linspace(-2, 2, 32) if bias else None
    linear = QuantLinear(packed(), values, dtype)
    assert linear.backend == backend
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = linear(x)
    assert got.dtype == dtype and got.shape == (*shape[:-1], 32)
    want = x.double() @ dequantize(packed(), torch.float64).T
    near(got, want if values is None else want + values.double(), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_ordinary_linear_of_the_same_weights(dtype):
    bias = torch.linspace(-1, 1, 32)
    quantized, ordinary = QuantLinear(packed(), bias, dtype), fake_quantized(packed(), bias, dtype)
    assert type(ordinary) is torch.nn.Linear and ordinary.weight.dtype == dtype and not ordinary.weight.requires_grad
    assert torch.equal(ordinary.weight, dequantize(packed(), dtype)) and torch.equal(ordinary.bias, bias.to(dtype))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    near(quantized(x), ordinary(x), 1e-5 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize(("given", "prepared"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_answer_has_the_dtype_of_the_question(given, prepared):
    linear = QuantLinear(packed(), torch.ones(32), prepared)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(given)
    got = linear(x)
    assert got.dtype == given
    near(got, x.double() @ dequantize(packed(), torch.float64).T + 1, 1.5e-2)


def test_a_view_that_is_not_contiguous():
    linear = QuantLinear(packed(), None, torch.float32)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)).T
    assert not x.is_contiguous()
    near(linear(x), x.double() @ dequantize(packed(), torch.float64).T, 1e-5)


def test_what_it_says_of_itself(monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    linear = QuantLinear(packed(96, 16, groups=3), torch.zeros(16), torch.float32)
    assert (linear.in_features, linear.out_features, linear.group_size) == (96, 16, 32)
    for words in ("in_features=96", "out_features=16", "group_size=32", "bias=True", "kernel=reference"):
        assert words in repr(linear)


def test_a_row_may_be_one_group(monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "int4pack")
    linear = QuantLinear(packed(96, 16, groups=1), None, torch.bfloat16)
    assert (linear.group_size, linear.backend) == (96, "int4pack")


def test_copies_compute_the_same_and_nothing_is_trained_or_saved_twice():
    linear = QuantLinear(packed(), torch.ones(32), torch.bfloat16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    assert torch.equal(copy.deepcopy(linear)(x), linear(x))
    assert not list(linear.parameters())
    assert not linear.state_dict(), "weights in a kernel's own layout must not get into a checkpoint"


def test_it_takes_half_the_memory_of_eight_bits():
    linear = QuantLinear(packed(256, 128, groups=2), None, torch.bfloat16)
    size = sum(buffer.nbytes for buffer in linear.buffers())
    assert size < 256 * 128 * 0.55
