"""The scale search against a search that forwards every token for every candidate."""

import pytest
import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization import scales
from awq_core.quantization.rounding import round_trip

from .conftest import outlier_layer, statistics_of

DTYPE = torch.float16


def token_search(x, weights, group_size):
    """The oracle: the same candidates, each scored by multiplying all tokens with each quantized weight."""
    statistics = statistics_of(x)
    magnitude = scales._magnitude(torch.cat(weights), group_size).mean(0)
    results = []
    for family, alpha, scale in scales._candidates(magnitude, statistics.mean_abs):
        total = 0.0
        for weight in weights:
            quantized = round_trip(weight * scale, group_size, DTYPE)
            difference = (x / scale) @ quantized.T - x @ weight.T
            total += float(difference.square().sum() / (x @ weight.T).square().sum())
        results.append((total, family, alpha))
    return results


def token_rtn(x, weight, group_size):
    """Mean squared output error of round-to-nearest, over tokens and outputs."""
    return float((x @ (round_trip(weight, group_size, DTYPE) - weight).T).square().mean())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_search_agrees_with_the_token_oracle(generator, group_size):
    x, weight = outlier_layer(generator)
    weights = [weight, torch.randn(24, 128, generator=generator)]
    found = scales.search(lambda: weights, statistics_of(x), group_size, DTYPE)
    oracle = token_search(x, weights, group_size)
    loss, family, alpha = min(oracle)
    assert found.loss == pytest.approx(loss, rel=1e-3)
    assert (found.family, found.alpha) == (family, alpha)
    assert found.loss_identity == pytest.approx(oracle[0][0], rel=1e-3)
    assert found.losses_rtn == pytest.approx([token_rtn(x, weight, group_size) for weight in weights], rel=1e-3)


def test_outliers_gain_much_and_identity_is_the_worst_case(generator):
    x, weight = outlier_layer(generator)
    found = scales.search(lambda: [weight], statistics_of(x), 128, DTYPE)
    assert found.loss < 0.5 * found.loss_identity
    flat = scales.search(
        lambda: [weight], statistics_of(torch.sign(torch.randn(300, 128, generator=generator))), 128, DTYPE
    )
    assert flat.loss <= flat.loss_identity


def test_screening_on_a_sample_of_rows_never_loses_to_the_identity(generator):
    x, _ = outlier_layer(generator)
    weight = torch.randn(scales.SCREEN_EVERY * scales.SCREEN_MIN_ROWS, 128, generator=generator)
    found = scales.search(lambda: [weight], statistics_of(x), 64, DTYPE)
    assert found.loss <= found.loss_identity
    oracle = token_search(x, [weight], 64)
    assert found.loss / found.loss_identity <= min(oracle)[0] / oracle[0][0] * 1.02
    assert found.losses_rtn == pytest.approx((token_rtn(x, weight, 64),), rel=1e-3)


def test_dead_channels_keep_scale_one(generator):
    x, weight = outlier_layer(generator)
    x[:, 7] = 0
    found = scales.search(lambda: [weight], statistics_of(x), 64, DTYPE)
    assert found.scale[7] == 1 and torch.isfinite(found.scale).all()


def test_inputs_that_are_all_zero_give_the_identity(generator):
    weight = torch.randn(8, 64, generator=generator)
    statistics = Statistics(10, torch.zeros(64, 64), torch.zeros(64), torch.zeros(64))
    found = scales.search(lambda: [weight], statistics, 32, DTYPE)
    assert torch.equal(found.scale, torch.ones(64)) and found.family == "identity"


def test_a_large_linear_does_not_decide_alone(generator):
    """Losses are divided by output energy: scaling one member's weights by 100 leaves the choice as it was."""
    x, weight = outlier_layer(generator)
    other = torch.randn(48, 128, generator=generator) * 0.02
    plain = scales.search(lambda: [weight, other], statistics_of(x), 64, DTYPE)
    heavy = scales.search(lambda: [weight, other * 128], statistics_of(x), 64, DTYPE)
    assert (plain.family, plain.alpha) == (heavy.family, heavy.alpha)
