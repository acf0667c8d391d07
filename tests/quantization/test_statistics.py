"""The Gram loss is the token loss."""

import pytest
import torch

from awq_core.calibration.statistics import StatisticsAccumulator, output_loss
from awq_core.errors import NumericsError

from .conftest import statistics_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_loss_equals_the_loss_over_tokens(generator, dtype):
    x = (torch.randn(201, 33, generator=generator) * 3 + 0.5).to(dtype)
    error = torch.randn(7, 33, generator=generator)
    by_token = torch.stack([(error @ row.float()) ** 2 for row in x]).mean(0)
    torch.testing.assert_close(output_loss(error, statistics_of(x).gram), by_token, rtol=1e-4, atol=1e-5)


def test_means(generator):
    x = torch.randn(77, 5, generator=generator)
    statistics = statistics_of(x)
    assert statistics.n == 77
    torch.testing.assert_close(statistics.mean, x.mean(0))
    torch.testing.assert_close(statistics.mean_abs, x.abs().mean(0))


def test_padding_tokens_do_not_count(generator):
    x = torch.randn(2, 6, 4, generator=generator)
    mask = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    accumulator = StatisticsAccumulator(4, x.device)
    accumulator.add(x, mask)
    kept = statistics_of(torch.cat([x[0, 2:], x[1]]))
    statistics = accumulator.finish("x")
    assert statistics.n == 10
    torch.testing.assert_close(statistics.gram, kept.gram)


def test_scaled_statistics_are_those_of_scaled_inputs(generator):
    x, s = torch.randn(50, 8, generator=generator), torch.rand(8, generator=generator) + 0.5
    rescaled, expected = statistics_of(x), statistics_of(x / s)
    rescaled.rescale_(s)
    for name in ("gram", "mean_abs", "mean"):
        torch.testing.assert_close(getattr(rescaled, name), getattr(expected, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_overflowing_activations_name_the_layer(bad):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(NumericsError, match=r"blocks\.3\.up"):
        statistics_of(x, "blocks.3.up")
