"""What the rounding methods share."""

import pytest
import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization import gptq, greedy, heuristic
from awq_core.quantization.rounded import shrinkage_ridge
from awq_core.quantization.rounding import Grid

from .conftest import statistics_of


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 0.7])
def test_the_ridge_shrinks_the_off_diagonal_up_to_a_factor(generator, shrinkage):
    statistics = statistics_of(torch.randn(40, 6, generator=generator))
    gram = statistics.gram
    shrunk = (1 - shrinkage) * gram + shrinkage * torch.diag(gram.diagonal())
    ridged = gram + torch.diag(shrinkage_ridge(statistics, shrinkage))
    torch.testing.assert_close((1 - shrinkage) * ridged, shrunk)


@pytest.mark.parametrize(("tokens", "expected"), [(640, 1 / 11), (192, 0.25), (64, 0.5), (1, 64 / 65)])
def test_few_tokens_are_trusted_less(generator, tokens, expected):
    statistics = statistics_of(torch.randn(tokens, 64, generator=generator))
    ratio = shrinkage_ridge(statistics) / statistics.gram.diagonal()
    torch.testing.assert_close(ratio, torch.full((64,), expected / (1 - expected)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.0, float("nan")])
def test_impossible_shrinkage_is_refused(generator, shrinkage):
    with pytest.raises(ValueError, match="shrinkage"):
        shrinkage_ridge(statistics_of(torch.randn(9, 4, generator=generator)), shrinkage)


def test_shrinking_is_seeing_more_tokens_with_independent_channels(generator):
    statistics = statistics_of(torch.randn(40, 6, generator=generator))
    more = (40 * statistics.gram + 6 * torch.diag(statistics.gram.diagonal())) / 46
    ridged = statistics.gram + torch.diag(shrinkage_ridge(statistics))
    torch.testing.assert_close(ridged / ridged[0, 0], more / more[0, 0])


@pytest.mark.parametrize("method", [heuristic, greedy, gptq])
def test_statistics_of_no_tokens_leave_the_nearest_codes(method):
    statistics = Statistics(0, torch.zeros(64, 64), torch.zeros(64), torch.zeros(64))
    weight = torch.linspace(-1, 1, 64)[None]
    grid = Grid(torch.full((1, 2), 0.14), torch.full((1, 2), 7.0))
    assert method.round_rows(weight, grid, torch.float16, method.prepare(statistics)).flips == 0
