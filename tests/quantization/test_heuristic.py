"""The heuristic against plain loops over one row, and against every prefix of its flips."""

import itertools
import math

import pytest
import torch

from awq_core.calibration.statistics import Statistics
from awq_core.quantization import heuristic
from awq_core.quantization.rounding import Grid, decode, grouped, nearest

from .conftest import statistics_of
from .layers import assert_codes, correlated_layer, grid_of

DTYPE = torch.float16


def with_mean(mean):
    columns = mean.numel()
    return Statistics(1000, torch.eye(columns), mean.abs(), mean)


def mean_error(weight, codes, grid, mean):
    return ((weight - decode(codes, grid).flatten(-2)).double() @ mean.double()).abs()


def knee_by_hand(values, tolerance):
    """Largest vertical distance to the chord over the larger half, in plain arithmetic."""
    half = sorted(values, reverse=True)[: max(1, len(values) // 2)]
    distances = []
    for index, value in enumerate(half):
        x = index / max(1, len(half) - 1)
        y = (value - half[-1]) / (half[0] - half[-1]) if half[0] > half[-1] else 0.0
        distances.append(abs(y - (1 - x)) if half[0] > half[-1] else 0.0)
    index = distances.index(max(distances)) + int(tolerance * len(half))
    return half[max(0, min(index, len(half) - 1))]


def row_by_hand(weight, steps, zeros, size, mean, percent, tolerance):
    """One row: nearest codes, then every possible number of flips tried; returns (codes, flips)."""
    codes, residues = [], []
    for i, value in enumerate(weight):
        real = value / steps[i // size] + zeros[i // size]
        codes.append(min(15, max(0, round(value / steps[i // size]) + zeros[i // size])))
        residues.append(real - codes[-1])
    decoded = [(code - zeros[i // size]) * steps[i // size] for i, code in enumerate(codes)]
    error = sum(m * (w - d) for m, w, d in zip(mean, weight, decoded, strict=True))
    limit = knee_by_hand([abs(m) for m in mean], tolerance)
    flips = []
    for i, residue in enumerate(residues):
        direction = -1 if residue < 0 else 1
        change = mean[i] * direction * steps[i // size]
        if abs(mean[i]) <= limit and 0 <= codes[i] + direction <= 15 and change * error > 0:
            flips.append((-abs(residue), i, direction, change))
    flips.sort()
    flips = flips[: math.floor(percent * len(weight))]
    left = [abs(error - sum(flip[3] for flip in flips[:count])) for count in range(len(flips) + 1)]
    count = left.index(min(left))
    for _, i, direction, _ in flips[:count]:
        codes[i] += direction
    return codes, count


@pytest.mark.parametrize(
    ("in_features", "size", "percent", "tolerance"),
    [(64, 16, 0.2, 0.0), (64, 64, 0.1, 0.1), (8, 8, 1.0, 0.0), (96, 32, 0.05, -0.2), (128, 32, 0.01, 0.0)],
)
def test_codes_equal_plain_loops(generator, in_features, size, percent, tolerance):
    x, weight = correlated_layer(generator, in_features=in_features, out_features=21)
    statistics, grid = statistics_of(x), grid_of(weight, size)
    prepared = heuristic.prepare(statistics, max_flip_percent=percent, knee_tolerance=tolerance)
    found = heuristic.round_rows(weight, grid, DTYPE, prepared)
    total = 0
    for row in range(len(weight)):
        codes, count = row_by_hand(
            *(weight[row].tolist(), grid.step[row].tolist(), grid.zero[row].tolist()),
            *(size, statistics.mean.tolist(), percent, tolerance),
        )
        assert found.codes[row].flatten().tolist() == codes
        total += count
    assert found.flips == total > 0
    limit = knee_by_hand(statistics.mean.abs().tolist(), tolerance)
    assert found.masked == pytest.approx(sum(m > limit for m in statistics.mean.abs().tolist()) / in_features)


def test_no_set_of_flips_does_better_than_its_prefix_where_prefixes_are_all_there_is(generator):
    """Equal changes: which flips are taken does not matter, only how many, so every subset can be tried."""
    weight = (torch.arange(8) + torch.rand(8, generator=generator) * 0.4 + 0.05)[None]
    grid, mean = Grid(torch.ones(1, 1), torch.zeros(1, 1)), torch.full((8,), 0.5)
    found = heuristic.round_rows(weight, grid, DTYPE, heuristic.prepare(with_mean(mean), max_flip_percent=1.0))
    codes = nearest(grouped(weight, 8), grid)
    subsets = itertools.product((0, 1), repeat=8)
    best = min(float(mean_error(weight, codes + torch.tensor(flips), grid, mean)) for flips in subsets)
    assert float(mean_error(weight, found.codes, grid, mean)) == pytest.approx(best, abs=1e-6)
    assert found.flips > 0


@pytest.mark.parametrize("out_features", [1, 17])
@pytest.mark.parametrize("size", [32, 64])
def test_the_mean_error_falls_and_the_cap_holds(generator, out_features, size):
    x, weight = correlated_layer(generator, out_features=out_features)
    statistics, grid = statistics_of(x), grid_of(weight, size)
    plain = nearest(grouped(weight, size), grid)
    found = heuristic.round_rows(weight, grid, DTYPE, heuristic.prepare(statistics, max_flip_percent=0.05))
    before, after = (mean_error(weight, codes, grid, statistics.mean) for codes in (plain, found.codes))
    assert (after <= before * (1 + 1e-5)).all() and after.sum() <= before.sum() * (1 if out_features == 1 else 0.8)
    moved = (found.codes - plain).flatten(1)
    assert moved.abs().max() <= 1 and (moved != 0).sum(1).max() <= 3 and int((moved != 0).sum()) == found.flips
    assert_codes(found.codes, plain.shape)


def test_moves_are_to_the_other_neighbour_and_never_out_of_range(generator):
    x, weight = correlated_layer(generator, out_features=33)
    grid = grid_of(weight, 32, shrink=0.5)
    found = heuristic.round_rows(weight, grid, DTYPE, heuristic.prepare(statistics_of(x), max_flip_percent=1.0))
    real = grouped(weight, 32) / grid.step[..., None] + grid.zero[..., None]
    plain = nearest(grouped(weight, 32), grid)
    moved = found.codes != plain
    assert ((found.codes - real).abs()[moved] <= 1 + 1e-4).all() and moved.sum() == found.flips > 100
    assert_codes(found.codes, plain.shape)


def test_outlier_channels_never_flip(generator):
    x, weight = correlated_layer(generator, out_features=40)
    x[:, [3, 40]] += 30
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    prepared = heuristic.prepare(statistics, max_flip_percent=1.0)
    assert not prepared.free[[3, 40]].any()
    found = heuristic.round_rows(weight, grid, DTYPE, prepared)
    assert 2 / 64 <= found.masked < 0.3
    moved = (found.codes != nearest(grouped(weight, 32), grid)).flatten(-2)
    assert not moved[:, ~prepared.free].any() and moved.any()
    larger = heuristic.prepare(statistics, knee_tolerance=0.5)
    assert larger.free.sum() < prepared.free.sum()


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0, 2.0], [0.0] * 8, [9.0, 1.0]])
def test_without_a_knee_nothing_is_masked(values):
    assert float(heuristic.knee(torch.tensor(values))) == max(values)


@pytest.mark.parametrize("tolerance", [0.0, 0.3, 5.0, -5.0])
def test_knee_equals_plain_arithmetic(generator, tolerance):
    values = torch.randn(51, generator=generator).abs() ** 3
    assert float(heuristic.knee(values, tolerance)) == pytest.approx(knee_by_hand(values.tolist(), tolerance))


def test_without_a_mean_error_nothing_moves(generator):
    weight = torch.randn(3, 64, generator=generator)
    grid = grid_of(weight, 32)
    zero_mean = heuristic.prepare(with_mean(torch.zeros(64)), max_flip_percent=1.0)
    assert heuristic.round_rows(weight, grid, DTYPE, zero_mean).flips == 0
    mean = heuristic.prepare(with_mean(torch.rand(64, generator=generator)), max_flip_percent=1.0)
    found = heuristic.round_rows(torch.zeros(3, 64), grid_of(torch.zeros(3, 64), 32), DTYPE, mean)
    assert found.flips == 0 and not found.codes.any()


def test_dead_channels_stay_nearest(generator):
    x, weight = correlated_layer(generator, out_features=30)
    x[:, ::2] = 0
    grid = grid_of(weight, 32)
    found = heuristic.round_rows(weight, grid, DTYPE, heuristic.prepare(statistics_of(x), max_flip_percent=1.0))
    moved = (found.codes != nearest(grouped(weight, 32), grid)).flatten(-2)
    assert not moved[:, ::2].any() and moved[:, 1::2].any()


def test_a_row_shorter_than_one_flip_stays_nearest(generator):
    x, weight = correlated_layer(generator)
    found = heuristic.round_rows(weight, grid_of(weight, 32), DTYPE, heuristic.prepare(statistics_of(x)))
    assert found.flips == 0 and found.method == "heuristic"
