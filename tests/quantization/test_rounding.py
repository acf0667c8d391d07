"""The group quantizer against scalar arithmetic, one weight at a time."""

import pytest
import torch

from awq_core.quantization.rounding import (
    LEVELS,
    decode,
    full_range,
    grouped,
    make_grid,
    nearest,
    round_trip,
)


def scalar_round_trip(weight, group_size, dtype):
    """Plain loops: range with zero, step rounded to its storage dtype, integer zero, nearest code."""
    out = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group_size):
            values = weight[row, start : start + group_size].tolist()
            low, high = min(0.0, *values), max(0.0, *values)
            step = torch.tensor(max((high - low) / 15, 2.0**-20)).to(dtype).item()
            zero = min(15, max(0, round(-low / step)))
            for offset, value in enumerate(values):
                code = min(15, max(0, round(value / step) + zero))
                out[row, start + offset] = (code - zero) * step
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 96])
def test_round_trip_equals_scalar_arithmetic(generator, group_size, dtype):
    weight = torch.randn(5, 192, generator=generator)
    weight[0, :group_size] = weight[0, :group_size].abs() + 1  # a group of one sign
    weight[1, :group_size] = -weight[1, :group_size].abs() - 1
    weight[2, :group_size] = 0.3  # a constant group
    weight[3] = 0
    expected = scalar_round_trip(weight, group_size, dtype)
    torch.testing.assert_close(round_trip(weight, group_size, dtype), expected, rtol=0, atol=1e-6)


def test_error_is_at_most_half_a_step(generator):
    groups = grouped(torch.randn(9, 128, generator=generator), 32)
    grid = make_grid(*full_range(groups), torch.float16)
    # The zero point is rounded as well, so an end of the range may lose up to half a step more.
    assert ((decode(nearest(groups, grid), grid) - groups).abs() <= 1.01 * grid.step[..., None]).all()


def test_codes_and_zeros_fit_four_bits(generator):
    groups = grouped(torch.randn(9, 128, generator=generator) * 1e-3, 32)
    lo, hi = full_range(groups)
    grid = make_grid(lo * 0.5, hi * 0.9, torch.bfloat16)
    codes = nearest(groups, grid)
    for value in (codes, grid.zero):
        assert value.min() >= 0 and value.max() <= LEVELS and torch.equal(value, value.round())


def test_a_group_of_one_sign_keeps_its_values():
    """AutoAWQ's range does not include zero: a group in [1, 1.5] becomes all 0.5 there."""
    weight = torch.linspace(1, 1.5, 32)[None]
    assert (round_trip(weight, 32, torch.float16) - weight).abs().max() <= 0.051


def test_zero_stays_zero(generator):
    weight = torch.randn(4, 64, generator=generator)
    weight[:, ::3] = 0
    assert (round_trip(weight, 32, torch.float16)[:, ::3] == 0).all()


def test_step_is_exactly_what_is_stored(generator):
    groups = grouped(torch.randn(4, 64, generator=generator), 32)
    for dtype in (torch.float16, torch.bfloat16):
        step = make_grid(*full_range(groups), dtype).step
        assert torch.equal(step, step.to(dtype).float())
