"""The scale search against a search that forwards every token for every candidate."""

import pytest
import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization import scales
from awq_core.quantization.linear import Pending
from awq_core.quantization.rounding import round_trip

from .conftest import outlier_layer, statistics_of

DTYPE = torch.float16


def token_search(x, weights, group_size):
    """The oracle: the same candidates, each scored by multiplying all tokens with each quantized weight."""
    statistics = statistics_of(x)
    magnitude = scales._magnitude(torch.cat(weights), group_size).mean(0)
    results = []
    for family, alpha, beta, scale in scales._candidates(magnitude, statistics.mean_abs):
        total = 0.0
        for weight in weights:
            quantized = round_trip(weight * scale, group_size, DTYPE)
            difference = (x / scale) @ quantized.T - x @ weight.T
            total += float(difference.square().sum() / (x @ weight.T).square().sum())
        results.append((total, family, alpha, beta))
    return results


def token_rtn(x, weight, group_size):
    """Mean squared output error of round-to-nearest, over tokens and outputs."""
    return float((x @ (round_trip(weight, group_size, DTYPE) - weight).T).square().mean())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_search_agrees_with_the_token_oracle(generator, group_size):
    x, weight = outlier_layer(generator)
    weights = [weight, torch.randn(24, 128, generator=generator)]
    found = scales.search(map(Pending, weights), statistics_of(x), group_size, DTYPE)
    oracle = token_search(x, weights, group_size)
    loss, family, alpha, beta = min(oracle)
    assert found.loss == pytest.approx(loss, rel=1e-3)
    assert (found.family, found.alpha, found.beta) == (family, alpha, beta)
    assert found.loss_identity == pytest.approx(oracle[0][0], rel=1e-3)
    assert found.losses_rtn == pytest.approx([token_rtn(x, weight, group_size) for weight in weights], rel=1e-3)


def test_the_grid_is_searched_between_the_lines(generator):
    """Both lines, and every (α, β) of a coarse grid that lies on neither; identity first."""
    x, weight = outlier_layer(generator)
    statistics = statistics_of(x)
    magnitude = scales._magnitude(weight, 32).mean(0)
    tried = list(scales._candidates(magnitude, statistics.mean_abs))
    assert torch.equal(tried[0][3], torch.ones(128))
    quarters = (0.25, 0.5, 0.75, 1.0)
    pairs = [(a, 0.0) for a in quarters] + [(a, b) for a in quarters for b in quarters]
    for alpha, beta in pairs:
        wanted = statistics.mean_abs**alpha / magnitude**beta
        wanted = wanted / (wanted.max() * wanted.min()).sqrt()
        equal = [(a, b) for _, a, b, scale in tried if torch.allclose(scale, wanted, rtol=1e-4)]
        assert (alpha, beta) in equal


def test_salience_scales_are_powers_of_the_second_moment(generator):
    x = torch.randn(200, 16, generator=generator) * torch.exp(torch.randn(16, generator=generator))
    x[:, 5] = 0
    statistics = statistics_of(x)
    without = list(scales._candidates(torch.ones(16), statistics.mean_abs))
    found = list(scales._candidates(torch.ones(16), statistics.mean_abs, statistics.gram.diagonal()))[len(without) :]
    assert [alpha for _, alpha, _, _ in found] == pytest.approx([step / 20 for step in range(1, 21)])
    alive = torch.arange(16) != 5
    for family, alpha, _, scale in found:
        expected = x.square().mean(0)[alive] ** alpha
        torch.testing.assert_close(scale[alive] / scale[0], expected / expected[0], rtol=1e-4, atol=0)
        assert scale[5] == 1 and float(scale[alive].max() * scale[alive].min()) == pytest.approx(1, rel=1e-4)
        assert family == "salience"


def test_salience_is_tried_when_asked_for(generator):
    """Columns of equal E|x| and unequal E[x²]: the rarer a column's values, the larger they are."""
    share = torch.logspace(-2, 0, 64)
    x = (torch.rand(4000, 64, generator=generator) < share) * torch.randn(4000, 64, generator=generator).sign() / share
    weight = torch.randn(32, 64, generator=generator)
    plain = scales.search([Pending(weight)], statistics_of(x), 32, DTYPE)
    salient = scales.search([Pending(weight)], statistics_of(x), 32, DTYPE, salience=True)
    assert salient.loss < plain.loss and salient.family == "salience"


def test_outliers_gain_much_and_identity_is_the_worst_case(generator):
    x, weight = outlier_layer(generator)
    found = scales.search([Pending(weight)], statistics_of(x), 128, DTYPE)
    assert found.loss < 0.5 * found.loss_identity
    flat = scales.search(
        [Pending(weight)], statistics_of(torch.sign(torch.randn(300, 128, generator=generator))), 128, DTYPE
    )
    assert flat.loss <= flat.loss_identity


def test_screening_on_a_sample_of_rows_never_loses_to_the_identity(generator):
    x, _ = outlier_layer(generator)
    weight = torch.randn(scales.SCREEN_EVERY * scales.SCREEN_MIN_ROWS, 128, generator=generator)
    found = scales.search([Pending(weight)], statistics_of(x), 64, DTYPE)
    assert found.loss <= found.loss_identity
    oracle = token_search(x, [weight], 64)
    assert found.loss / found.loss_identity <= min(oracle)[0] / oracle[0][0] * 1.02
    assert found.losses_rtn == pytest.approx((token_rtn(x, weight, 64),), rel=1e-3)


def test_dead_channels_keep_scale_one(generator):
    x, weight = outlier_layer(generator)
    x[:, 7] = 0
    found = scales.search([Pending(weight)], statistics_of(x), 64, DTYPE)
    assert found.scale[7] == 1 and torch.isfinite(found.scale).all()


def test_inputs_that_are_all_zero_give_the_identity(generator):
    weight = torch.randn(8, 64, generator=generator)
    statistics = Statistics(10, torch.zeros(64, 64), torch.zeros(64), torch.zeros(64))
    found = scales.search([Pending(weight)], statistics, 32, DTYPE)
    assert torch.equal(found.scale, torch.ones(64)) and found.family == "identity"


def test_a_large_linear_does_not_decide_alone(generator):
    """Losses are divided by output energy: scaling one member's weights by 100 leaves the choice as it was."""
    x, weight = outlier_layer(generator)
    other = torch.randn(48, 128, generator=generator) * 0.02
    plain = scales.search([Pending(weight), Pending(other)], statistics_of(x), 64, DTYPE)
    heavy = scales.search([Pending(weight), Pending(other * 128)], statistics_of(x), 64, DTYPE)
    assert (plain.family, plain.alpha) == (heavy.family, heavy.alpha)
