"""Torch's int4 product for CPUs, against the exact product of the same codes."""

import pytest
import torch

from awq_core.kernels.cpu import int4pack
from awq_core.kernels.cpu.int4pack import Int4PackKernel
from awq_core.kernels.reference import ReferenceKernel
from awq_core.runtime.linear import QuantLinear

TOLERANCE = 1e-2


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def activations(tokens, inputs):
    return torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 3, 17])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size"),
    [
        (64, 16, 32),
        (192, 48, 64),
        (256, 80, 128),
        (512, 16, -1),
        (96, 112, -1),
        (160, 32, -1),
        (1024, 64, 256),
        (192, 32, 96),
    ],
)
def test_it_agrees_with_the_reference(make, tokens, inputs, outputs, group_size):
    case = make(inputs, outputs, group_size, seed=outputs)
    x = activations(tokens, inputs)
    kernel, reference = Int4PackKernel(), ReferenceKernel()
    assert kernel.unsupported(case.packed, torch.bfloat16) == ""
    got = kernel.linear(x, kernel.prepare(case.packed, torch.bfloat16))
    assert got.shape == (tokens, outputs) and got.dtype == torch.bfloat16
    assert apart(got, x.double() @ case.weight.T) < TOLERANCE
    assert apart(got, reference.linear(x.float(), reference.prepare(case.packed, torch.float32))) < TOLERANCE


@pytest.mark.parametrize("outputs", [512, 528, 1040])
def test_it_is_laid_out_in_parts(make, outputs, monkeypatch):
    """Some columns at a time, and all at once, are the same bytes."""
    case, kernel = make(64, outputs, 32), Int4PackKernel()
    parts = kernel.prepare(case.packed, torch.bfloat16)
    monkeypatch.setattr(int4pack, "PREPARED", 1 << 20)
    whole = kernel.prepare(case.packed, torch.bfloat16)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("zero", [0, 7, 8, 15])
def test_every_zero_point_is_the_right_one(make, zero):
    """One zero point everywhere: an offset by one would show in every output."""
    case = make(64, 32, 32)
    filled = case.packed.qzeros.new_tensor([zero * 0x11111111 - (1 << 32 if zero > 7 else 0)]).expand(2, 4)
    packed = type(case.packed)(case.packed.qweight, filled.contiguous(), case.packed.scales)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    kernel, reference = Int4PackKernel(), ReferenceKernel()
    want = reference.linear(x.float(), reference.prepare(packed, torch.float32))
    got = kernel.linear(x, kernel.prepare(packed, torch.bfloat16))
    shift = 64 * float(packed.scales.float().mean())  # what a zero point off by one would do
    assert float((got.float() - want).abs().max()) < 0.3 * shift
    assert apart(got, want) < TOLERANCE


def test_scales_in_bf16_are_read_too(make):
    case = make(128, 32, 64, dtype=torch.bfloat16)
    x, kernel = activations(5, 128), Int4PackKernel()
    got = kernel.linear(x, kernel.prepare(case.packed, torch.bfloat16))
    assert apart(got, x.double() @ case.weight.T) < TOLERANCE


def test_no_tokens_no_rows(make):
    case, kernel = make(64, 16, 32), Int4PackKernel()
    got = kernel.linear(activations(0, 64), kernel.prepare(case.packed, torch.bfloat16))
    assert got.shape == (0, 16) and got.dtype == torch.bfloat16


def test_a_strided_input_is_read_right(make):
    case, kernel = make(64, 16, 32), Int4PackKernel()
    x = activations(6, 128)[::2, ::2]
    assert not x.is_contiguous()
    got = kernel.linear(x, kernel.prepare(case.packed, torch.bfloat16))
    assert apart(got, x.double() @ case.weight.T) < TOLERANCE


@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size"),
    [(64, 16, 32), (64, 48, 64), (96, 64, 32), (256, 80, 128), (512, 208, 256), (96, 1040, -1)],
)
def test_its_weight_is_read_back(make, inputs, outputs, group_size):
    case, kernel = make(inputs, outputs, group_size), Int4PackKernel()
    state = kernel.prepare(case.packed, torch.bfloat16)
    weight = kernel.dequantize(state, torch.float32)
    assert apart(weight, case.weight) < 5e-3
    rows = kernel.linear(torch.eye(inputs, dtype=torch.bfloat16), state)
    assert torch.equal(weight.to(torch.bfloat16), rows.T), "the very weight the product works with"


def test_many_rows_go_the_other_way_and_agree(make, monkeypatch):
    case, kernel = make(128, 80, 64), Int4PackKernel()
    state, x = kernel.prepare(case.packed, torch.bfloat16), activations(int4pack.CROSSOVER, 128)
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
    got = kernel.linear(x, state)
    assert got.dtype == torch.bfloat16 and apart(got, x.double() @ case.weight.T) < TOLERANCE


def test_a_bias_is_added(make, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "int4pack")
    case = make(64, 48, 32)
    bias = torch.linspace(-9, 9, 48)
    linear = QuantLinear(case.packed, bias, torch.bfloat16)
    assert linear.backend == "int4pack"
    x = activations(3, 64)
    assert apart(linear(x), x.double() @ case.weight.T + bias.double()) < TOLERANCE
    difference = linear(x).float() - QuantLinear(case.packed, None, torch.bfloat16)(x).float()
    torch.testing.assert_close(difference, bias.expand(3, -1), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("inputs", "outputs", "group_size", "dtype", "words"),
    [
        (64, 16, 32, torch.float32, "float32 activations"),
        (64, 16, 32, torch.float16, "float16 activations"),
        (64, 24, 32, torch.bfloat16, "24 outputs are not a multiple of 16"),
        (48, 16, 48, torch.bfloat16, "group size 48 is not a multiple of 32"),
        (80, 16, -1, torch.bfloat16, "group size 80 is not a multiple of 32"),
    ],
)
def test_what_it_cannot_run_is_said(make, inputs, outputs, group_size, dtype, words):
    why = Int4PackKernel().unsupported(make(inputs, outputs, group_size).packed, dtype)
    assert words in why and "\n" not in why
