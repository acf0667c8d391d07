"""The Gram loss is the token loss."""

from dataclasses import replace

import pytest
import torch

from awq_core.calibration.statistics import Sums, output_loss
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
    sums = Sums.zeros(4, x.device)
    sums.add(x, mask)
    kept = statistics_of(torch.cat([x[0, 2:], x[1]]))
    statistics = sums.finish("x")
    assert statistics.n == 10
    torch.testing.assert_close(statistics.gram, kept.gram)


def test_gated_tokens_count_by_the_square_of_the_gate(generator):
    """In two batches, of which one is padded and one has no token of the expert."""
    x, gate = torch.randn(2, 9, 5, generator=generator), torch.rand(2, 9, generator=generator)
    gate[0, 3:5], gate[0, 6] = 0, -0.5
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2], mask[1] = False, False
    sums = Sums.zeros(5, x.device)
    for batch in range(2):
        sums.add(x[batch], mask[batch], gate[batch])
    found = sums.finish("x")
    tokens = [(x[0, t].double(), float(gate[0, t]) ** 2) for t in (2, 5, 6, 7, 8)]
    total = sum(w for _, w in tokens)
    assert found.n == 5
    assert found.n_effective == pytest.approx(total**2 / sum(w**2 for _, w in tokens))
    gram = sum(w * torch.outer(row, row) for row, w in tokens) / total
    torch.testing.assert_close(found.gram, gram.float())
    torch.testing.assert_close(found.mean, (sum(w * row for row, w in tokens) / total).float())
    torch.testing.assert_close(found.mean_abs, (sum(w * row.abs() for row, w in tokens) / total).float())


def test_equal_gates_over_every_token_change_nothing(generator):
    x = torch.randn(60, 6, generator=generator)
    everything = statistics_of(x)
    sums = Sums.zeros(6, x.device)
    sums.add(x, gate=torch.full((60,), 0.3))
    mixed = sums.finish("x").towards_(everything)
    torch.testing.assert_close(mixed.gram, everything.gram)
    torch.testing.assert_close(mixed.mean, everything.mean)
    assert mixed.n_effective == pytest.approx(60) and (mixed.n, mixed.routed) == (60, 60)


def test_own_statistics_are_mixed_in_the_units_the_shared_ones_were_rescaled_to(generator):
    x, s = torch.randn(40, 6, generator=generator), torch.rand(6, generator=generator) + 0.5
    gate = (torch.rand(40, generator=generator) - 0.6).clamp(min=0)

    def shared_and_own(rows):
        sums = Sums.zeros(6, x.device)
        sums.add(rows, gate=gate)
        return replace(statistics_of(rows), own=sums.finish("x"))

    expected = shared_and_own(x / s).with_own()
    shared = shared_and_own(x)
    shared.rescale_(s)
    for found in (shared.with_own(s), shared.with_own(s)):  # gate and up each ask
        for name in ("gram", "mean_abs", "mean"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


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
