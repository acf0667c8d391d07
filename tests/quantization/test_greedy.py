"""Greedy flips against plain loops that score every flip with the whole matrix, and against every set of flips."""

import itertools
import math

import pytest
import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization import greedy
from awq_core.quantization.rounding import grouped, nearest

from .conftest import statistics_of
from .layers import assert_codes, correlated_layer, grid_of, losses

DTYPE = torch.float16


def shrunk(gram, shrinkage):
    return (1 - shrinkage) * gram + shrinkage * torch.diag(gram.diagonal())


def flips_of(weight, grid, size):
    """Per row: nearest codes and, for every weight, the direction of its other neighbour, 0 where that is no code."""
    step, zero = (value.repeat_interleave(size, 1) for value in (grid.step, grid.zero))
    real = weight / step + zero
    codes = nearest(grouped(weight, size), grid).flatten(-2)
    direction = torch.where(real < codes, -1, 1)
    inside = (codes + direction >= 0) & (codes + direction <= 15)
    return codes, direction * inside


def row_by_hand(weight, codes, direction, grid, size, gram, cap):
    """One row: of all flips left, each scored by a full δ H δᵀ in fp64, the best is taken while it helps."""
    codes, closed, count = codes.clone(), set(), 0

    def score(candidate):
        return float(losses(weight[None], grouped(candidate[None], size), grid, gram))

    now = score(codes)
    while count < cap:
        options = []
        for i in range(len(codes)):
            if direction[i] and i not in closed:
                candidate = codes.clone()
                candidate[i] += direction[i]
                options.append((score(candidate), i))
        if not options or min(options)[0] >= now:
            break
        now, i = min(options)
        codes[i] += direction[i]
        closed.add(i)
        count += 1
    return codes, count


def one_row(grid, row):
    return type(grid)(grid.step[row : row + 1], grid.zero[row : row + 1])


@pytest.mark.parametrize(
    ("in_features", "size", "budget", "shrinkage"), [(32, 8, 0.25, 0.0), (24, 24, 1.0, 0.3), (48, 16, 0.1, 0.1)]
)
def test_codes_equal_plain_loops(generator, in_features, size, budget, shrinkage):
    x, weight = correlated_layer(generator, in_features=in_features, out_features=5)
    statistics, grid = statistics_of(x), grid_of(weight, size)
    found = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics, budget=budget, shrinkage=shrinkage))
    codes, direction = flips_of(weight, grid, size)
    gram, total = shrunk(statistics.gram, shrinkage), 0
    for row in range(len(weight)):
        cap = math.floor(budget * in_features)
        expected, count = row_by_hand(weight[row], codes[row], direction[row], one_row(grid, row), size, gram, cap)
        assert torch.equal(found.codes[row].flatten(), expected)
        total += count
    assert found.flips == total > 0


def test_among_all_sets_of_flips_it_is_never_worse_than_nearest_and_often_the_best(generator):
    x, weight = correlated_layer(generator, in_features=8, out_features=24, rank=3)
    statistics, grid = statistics_of(x), grid_of(weight, 8)
    found = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics, budget=1.0, shrinkage=0.0))
    loss = losses(weight, found.codes, grid, statistics.gram)
    codes, direction = flips_of(weight, grid, 8)
    every = torch.stack(
        [
            losses(weight, grouped(codes + direction * torch.tensor(chosen), 8), grid, statistics.gram)
            for chosen in itertools.product((0, 1), repeat=8)
        ]
    )
    assert (loss <= every[0] * (1 + 1e-6)).all() and (loss >= every.amin(0) * (1 - 1e-6)).all()
    # No single further flip helps: that is where it stops.
    single = torch.stack(
        [
            losses(weight, found.codes + grouped(direction * (torch.arange(8) == i), 8), grid, statistics.gram)
            for i in range(8)
        ]
    )
    untouched = ((found.codes.flatten(-2) == codes) & (direction != 0)).T
    assert (single[untouched] >= loss.expand(8, -1)[untouched] * (1 - 1e-6)).all()
    assert (loss <= every.amin(0) * (1 + 1e-6)).float().mean() > 0.3


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, None])
@pytest.mark.parametrize("out_features", [1, 7])
def test_the_loss_never_rises_and_the_cap_holds(generator, out_features, shrinkage):
    x, weight = correlated_layer(generator, out_features=out_features)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    found = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics, budget=0.05, shrinkage=shrinkage))
    plain = nearest(grouped(weight, 32), grid)
    before, after = (losses(weight, codes, grid, statistics.gram) for codes in (plain, found.codes))
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.9 * before.sum()
    moved = (found.codes - plain).flatten(1)
    assert moved.abs().max() == 1 and (moved != 0).sum(1).max() <= 3 and int((moved != 0).sum()) == found.flips
    assert_codes(found.codes, plain.shape)


def test_a_larger_budget_is_never_worse(generator):
    x, weight = correlated_layer(generator)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    loss = [
        losses(
            weight,
            greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics, budget=budget, shrinkage=0.0)).codes,
            grid,
            statistics.gram,
        )
        for budget in (0.0, 0.02, 0.1, 1.0)
    ]
    assert all((later <= earlier * (1 + 1e-6)).all() for earlier, later in itertools.pairwise(loss))
    assert loss[-1].sum() < 0.5 * loss[0].sum()


def test_saturated_weights_stay_where_they_are(generator):
    x, weight = correlated_layer(generator, out_features=20)
    grid = grid_of(weight, 32, shrink=0.4)
    found = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics_of(x), budget=1.0))
    real = grouped(weight, 32) / grid.step[..., None] + grid.zero[..., None]
    outside = (real < 0) | (real > 15)
    assert outside.any() and torch.equal(found.codes[outside], nearest(grouped(weight, 32), grid)[outside])
    assert ((found.codes - real).abs()[~outside] <= 1 + 1e-4).all()
    assert_codes(found.codes, real.shape)


def test_more_mistrust_means_fewer_flips(generator):
    x, weight = correlated_layer(generator, out_features=30)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    flips = [
        greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics, budget=1.0, shrinkage=shrinkage)).flips
        for shrinkage in (0.0, 0.3, 0.8, 0.999)
    ]
    assert flips[0] > flips[2] > flips[3] and flips[0] > 2 * flips[-1]


def test_independent_inputs_leave_the_nearest_codes(generator):
    weight = torch.randn(4, 64, generator=generator)
    gram = torch.diag(torch.rand(64, generator=generator))
    statistics = Statistics(10**6, gram, torch.ones(64), torch.zeros(64))
    assert greedy.round_rows(weight, grid_of(weight, 32), DTYPE, greedy.prepare(statistics, budget=1.0)).flips == 0


def test_dead_channels_and_rows_of_zeros_stay(generator):
    x, weight = correlated_layer(generator, out_features=12)
    x[:, ::2] = 0
    weight[3] = 0
    grid = grid_of(weight, 32)
    found = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics_of(x), budget=1.0))
    moved = (found.codes != nearest(grouped(weight, 32), grid)).flatten(-2)
    assert not moved[:, ::2].any() and not moved[3].any() and moved[:, 1::2].any()


def test_few_tokens_give_a_gram_of_low_rank_and_finite_codes(generator):
    x, weight = correlated_layer(generator, tokens=5)
    statistics, grid = statistics_of(x), grid_of(weight, 64)
    found = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics, budget=1.0))
    before = losses(weight, nearest(grouped(weight, 64), grid), grid, statistics.gram)
    assert (losses(weight, found.codes, grid, statistics.gram) <= before * (1 + 1e-6)).all()
    assert_codes(found.codes, (9, 1, 64))


def test_rows_do_not_depend_on_the_slice_they_are_in(generator, monkeypatch):
    x, weight = correlated_layer(generator, out_features=11)
    grid, prepared = grid_of(weight, 32), greedy.prepare(statistics_of(x), budget=0.2)
    whole = greedy.round_rows(weight, grid, DTYPE, prepared)
    monkeypatch.setattr(greedy, "CHUNK_ELEMENTS", 64 * 3)
    pieces = greedy.round_rows(weight, grid, DTYPE, prepared)
    assert torch.equal(whole.codes, pieces.codes) and whole.flips == pieces.flips
    tail = greedy.round_rows(weight[8:], type(grid)(grid.step[8:], grid.zero[8:]), DTYPE, prepared)
    assert torch.equal(whole.codes[8:], tail.codes)


@pytest.mark.parametrize("columns", [7, 128, 384])
def test_smallest_is_argmin(generator, columns):
    values = torch.randn(6, columns, generator=generator)
    values[2] = torch.inf
    values[2, 5] = 1.0
    assert torch.equal(greedy._smallest(values), values.argmin(1, keepdim=True))
