"""Bootstrap intervals: quantiles against torch's, coverage on draws from a known distribution."""

import math

import pytest
import torch

from awq_core.evaluation.intervals import bootstrap, p999, quantile


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
@pytest.mark.parametrize("q", [0.0, 0.025, 0.5, 0.999, 1.0])
def test_quantiles(count, q):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    assert float(quantile(values, q)) == pytest.approx(float(values.quantile(q)), abs=1e-12)


def test_the_mean_of_normal_draws():
    """For n normal values the interval is about mean ± 1.96 s/√n, and covers the truth about 95 times in 100."""
    covered, generator = 0, torch.Generator().manual_seed(1)
    for number in range(200):
        values = torch.randn(60, generator=generator, dtype=torch.float64) + 3
        low, high = bootstrap(values, draws=200, seed=number)
        half = 1.96 * float(values.std()) / math.sqrt(60)
        assert (high - low) / 2 == pytest.approx(half, rel=0.35)
        covered += low <= 3 <= high
    assert 178 <= covered <= 199


def test_windows_are_drawn_whole():
    """Positions of a window that are all alike carry no more information than the window's mean."""
    means = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    assert bootstrap(means[:, None].expand(-1, 100)) == pytest.approx(bootstrap(means))
    low, high = bootstrap(means[:, None].expand(-1, 100), p999)
    assert low in means and high == 8


def test_no_interval_of_one_window_and_the_same_twice():
    assert bootstrap(torch.ones(1, 5)) is None
    values = torch.rand(9)
    assert bootstrap(values) == bootstrap(values)
