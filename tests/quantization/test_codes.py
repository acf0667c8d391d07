"""Codes of a linear: ranges, rounding, losses, and that slices of rows change nothing."""

import pytest
import torch

from awq_core.config import QuantConfig
from awq_core.quantization import codes
from awq_core.quantization.rounding import Grid, decode, full_range, grouped, make_grid

from .conftest import outlier_layer, statistics_of

DTYPE = torch.bfloat16
ROUNDINGS = ("nearest", "heuristic", "greedy", "gptq")


def layer(generator):
    """Enough tokens for gptq, heavy-tailed weights."""
    x, weight = outlier_layer(generator, tokens=1024, out_features=24)
    return x, weight * torch.exp(torch.randn(weight.shape, generator=generator) / 2)


def output_error(x, weight, found, group_size):
    """Squared error of each output, summed over tokens, divided by their number."""
    quantized = decode(grouped(found.codes.float(), group_size), found.grid).flatten(-2)
    return (x @ (quantized - weight).T).square().mean(0)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("clip", ["asymmetric", "symmetric", "none"])
@pytest.mark.parametrize("group_size", [32, 128])
def test_the_loss_is_that_of_the_tokens(generator, rounding, clip, group_size):
    x, weight = layer(generator)
    config = QuantConfig(rounding=rounding, clip=clip)
    found = codes.choose(weight, statistics_of(x), group_size, DTYPE, config)
    torch.testing.assert_close(found.loss, output_error(x, weight, found, group_size), rtol=1e-3, atol=1e-6)
    assert found.codes.max() <= 15 and torch.equal(found.grid.step, found.grid.step.to(DTYPE).float())
    assert (found.clipped > 0) == (clip != "none") and (found.flipped > 0) == (rounding != "nearest")
    assert found.note == ""


def test_each_step_lowers_the_error(generator):
    x, weight = layer(generator)

    def error(**settings):
        return float(
            codes.choose(
                weight, statistics_of(x), 64, DTYPE, QuantConfig(**{"rounding": "nearest", **settings})
            ).loss.mean()
        )

    plain, clipped = error(clip="none"), error()
    assert error(clip="asymmetric") <= error(clip="symmetric") * 1.001 < plain
    assert error(rounding="gptq") < error(rounding="greedy") < clipped < plain


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_slices_of_rows_do_not_change_the_result(generator, monkeypatch, rounding):
    x, weight = layer(generator)
    config = QuantConfig(rounding=rounding)
    whole = codes.choose(weight, statistics_of(x), 64, DTYPE, config)
    monkeypatch.setattr(codes, "CHUNK_ELEMENTS", 128 * 7)
    pieces = codes.choose(weight, statistics_of(x), 64, DTYPE, config)
    # Products of other shapes may be added up in another order: a tie may fall the other way, no more.
    assert (whole.codes != pieces.codes).float().mean() < 0.01
    assert pieces.clipped == pytest.approx(whole.clipped, abs=0.01)
    assert pieces.flipped == pytest.approx(whole.flipped, abs=0.01)
    assert pieces.loss.sum() == pytest.approx(float(whole.loss.sum()), rel=1e-2)


def test_a_row_keeps_its_full_range_where_the_clip_does_harm(generator, monkeypatch):
    x, weight = layer(generator)

    def far_too_narrow(weight, gram, group_size, step_dtype, *, symmetric):
        lo, hi = full_range(grouped(weight, group_size))
        factor = torch.ones(len(weight), 1)
        factor[::2] = 0.1
        return lo * factor, hi * factor

    monkeypatch.setattr(codes.clip, "search", far_too_narrow)
    found = codes.choose(weight, statistics_of(x), 64, DTYPE, QuantConfig(rounding="nearest"))
    plain = codes.choose(weight, statistics_of(x), 64, DTYPE, QuantConfig(clip="none", rounding="nearest"))
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.loss, plain.loss)
    assert found.clipped == 0


def test_a_linear_that_no_token_reached_is_rounded_to_nearest(generator):
    _, weight = layer(generator)
    found = codes.choose(weight, None, 64, DTYPE, QuantConfig(rounding="gptq"))
    grid = make_grid(*full_range(grouped(weight, 64)), DTYPE)
    expected = (grouped(weight, 64) / grid.step[..., None]).round().add(grid.zero[..., None]).clamp(0, 15)
    assert torch.equal(found.codes.float(), expected.flatten(-2)) and found.loss is None


def test_a_known_grid_is_taken(generator, monkeypatch):
    x, weight = layer(generator)
    monkeypatch.setattr(codes, "CHUNK_ELEMENTS", 128 * 7)
    first = codes.choose(weight, statistics_of(x), 64, DTYPE, QuantConfig(rounding="nearest"))
    again = codes.choose(weight, None, 64, DTYPE, QuantConfig(rounding="nearest"), known=first.grid)
    assert isinstance(again.grid, Grid) and torch.equal(again.codes, first.codes)


def test_too_few_tokens_for_gptq_are_said(generator):
    x, weight = outlier_layer(generator, tokens=100)
    found = codes.choose(weight, statistics_of(x), 64, DTYPE, QuantConfig(rounding="gptq"))
    assert "gptq needs" in found.note and found.flipped > 0
