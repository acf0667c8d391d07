"""GPTQ against the textbook: one row, one column at a time, with the inverse of H eliminated column by column."""

import pytest
import torch

from awq_core.calibration.statistics import Statistics
from awq_core.errors import NumericsError
from awq_core.quantization import gptq, greedy
from awq_core.quantization.rounding import Grid, decode, grouped, nearest

from .conftest import statistics_of
from .layers import assert_codes, correlated_layer, grid_of, losses

DTYPE = torch.float16


def textbook(weight, grid, size, gram, order):
    """Optimal brain quantization in a fixed order (arXiv 2210.17323, eq. 2 and 3), in fp64; codes `[out, in]`."""
    step, zero = (value.repeat_interleave(size, 1).double() for value in (grid.step, grid.zero))
    inverse = torch.linalg.inv(gram.double())
    weight, codes = weight.double().clone(), torch.empty_like(weight)
    left = order.tolist()
    while left:
        k = left[0]
        codes[:, k] = ((weight[:, k] / step[:, k]).round() + zero[:, k]).clamp(0, 15).float()
        error = (weight[:, k] - (codes[:, k] - zero[:, k]) * step[:, k]) / inverse[k, k]
        for j in left:
            weight[:, j] -= error * inverse[k, j]
        inverse -= torch.outer(inverse[:, k], inverse[k, :]) / inverse[k, k]
        left.pop(0)
    return codes


def full_gram(prepared):
    return prepared.gram + torch.diag(prepared.ridge)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("in_features", "size", "shrinkage"), [(48, 16, 0.0), (160, 32, 0.1), (64, 64, 0.5)])
def test_codes_equal_the_textbook(generator, in_features, size, shrinkage, act_order):
    """160 columns: more than one block."""
    x, weight = correlated_layer(generator, tokens=900, in_features=in_features, rank=20)
    statistics, grid = statistics_of(x), grid_of(weight, size)
    prepared = gptq.prepare(statistics, shrinkage=shrinkage, sweeps=0, act_order=act_order)
    found = gptq.round_rows(weight, grid, DTYPE, prepared)
    order = statistics.gram.diagonal().argsort(descending=True) if act_order else torch.arange(in_features)
    expected = grouped(textbook(weight, grid, size, full_gram(prepared), order), size)
    plain = nearest(grouped(weight, size), grid)
    worse = losses(weight, expected, grid, statistics.gram) > losses(weight, plain, grid, statistics.gram)
    assert worse.sum() <= 1
    expected[worse] = plain[worse]
    assert torch.equal(found.codes, expected)
    assert found.flips == int((expected != plain).sum()) > 0
    assert torch.equal(found.grid.step, grid.step) and found.method == "gptq" and not found.note
    shrunk = (1 - shrinkage) * statistics.gram + shrinkage * torch.diag(statistics.gram.diagonal())
    torch.testing.assert_close((1 - shrinkage) * full_gram(prepared), shrunk, rtol=0, atol=2e-4 * float(shrunk.max()))


def test_the_loss_is_the_sum_of_squares_that_feedback_makes_small(generator):
    x, _ = correlated_layer(generator, in_features=32)
    prepared = gptq.prepare(statistics_of(x), shrinkage=0.1)
    matrix = full_gram(prepared)[prepared.order][:, prepared.order]
    upper = prepared.feedback
    assert torch.equal(upper, upper.triu()) and torch.equal(upper.diagonal(), torch.ones(32))
    inner = torch.linalg.solve_triangular(upper, matrix, upper=True)
    diagonal = torch.linalg.solve_triangular(upper, inner.T, upper=True)
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-3, rtol=0)
    assert (diagonal.diagonal() > 0).all()


@pytest.mark.parametrize("options", [{"sweeps": 0}, {"sweeps": 2, "refit": False}, {}, {"act_order": False}])
@pytest.mark.parametrize(("size", "out_features"), [(16, 7), (64, 1), (64, 12)])
def test_no_row_is_worse_than_nearest_and_all_together_are_much_better(generator, size, out_features, options):
    x, weight = correlated_layer(generator, out_features=out_features)
    statistics, grid = statistics_of(x), grid_of(weight, size)
    found = gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics, **options))
    before = losses(weight, nearest(grouped(weight, size), grid), grid, statistics.gram)
    after = losses(weight, found.codes, found.grid, statistics.gram)
    assert (after <= before * (1 + 1e-5)).all() and after.sum() < 0.5 * before.sum()
    assert_codes(found.codes, (out_features, 64 // size, size))
    assert torch.equal(found.grid.zero, grid.zero)
    if not options.get("refit", True) or not options.get("sweeps", 2):
        assert torch.equal(found.grid.step, grid.step)


def test_each_stage_helps(generator):
    x, weight = correlated_layer(generator, tokens=4000, in_features=128, out_features=80)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    stages = [{"sweeps": 0}, {"sweeps": 1, "refit": False}, {"sweeps": 3, "refit": False}, {"sweeps": 3}]
    total = [
        float(losses(weight, found.codes, found.grid, statistics.gram).sum())
        for found in (gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics, **stage)) for stage in stages)
    ]
    assert total == sorted(total, reverse=True) and total[-1] < 0.98 * total[0]


def test_it_holds_on_tokens_it_has_not_seen(generator):
    """Nearly independent channels, few tokens: unshrunk, feedback fits their noise and does harm on other tokens."""
    x, weight = correlated_layer(generator, tokens=5256, out_features=60, noise=8.0)
    seen, unseen = statistics_of(x[:256]), statistics_of(x[256:])
    grid = grid_of(weight, 32)
    loss = [
        float(losses(weight, found.codes, found.grid, unseen.gram).sum())
        for found in (
            gptq.round_rows(weight, grid, DTYPE, gptq.prepare(seen, shrinkage=shrinkage)) for shrinkage in (None, 0.0)
        )
    ]
    plain = float(losses(weight, nearest(grouped(weight, 32), grid), grid, unseen.gram).sum())
    assert loss[0] < 0.97 * loss[1] and loss[0] < plain


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_stay_what_their_dtype_holds(generator, dtype):
    x, weight = correlated_layer(generator)
    grid = grid_of(weight, 32, dtype)
    found = gptq.round_rows(weight, grid, dtype, gptq.prepare(statistics_of(x)))
    assert torch.equal(found.grid.step, found.grid.step.to(dtype).float())
    assert (found.grid.step != grid.step).any()


def test_too_few_tokens_are_said_and_greedy_flips_used_instead(generator):
    x, weight = correlated_layer(generator, tokens=255)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    prepared = gptq.prepare(statistics)
    assert isinstance(prepared, gptq.TooFewTokens) and "4 tokens an input channel" in prepared.note
    found = gptq.round_rows(weight, grid, DTYPE, prepared)
    expected = greedy.round_rows(weight, grid, DTYPE, greedy.prepare(statistics))
    assert torch.equal(found.codes, expected.codes) and found.flips == expected.flips > 0
    assert found.method == "greedy" and found.note == prepared.note
    half = gptq.prepare(statistics, shrinkage=0.5)
    assert isinstance(half, gptq.TooFewTokens)
    torch.testing.assert_close(half.greedy.ridge, statistics.gram.diagonal())
    assert isinstance(gptq.prepare(statistics_of(torch.cat([x, x[:1]]))), gptq.Prepared)
    assert isinstance(gptq.prepare(statistics, min_tokens_per_feature=0), gptq.Prepared)


@pytest.mark.parametrize("shrinkage", [0.0, None])
def test_a_gram_of_low_rank_gives_finite_codes(generator, shrinkage):
    x, weight = correlated_layer(generator, tokens=5)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    prepared = gptq.prepare(statistics, shrinkage=shrinkage, min_tokens_per_feature=0)
    found = gptq.round_rows(weight, grid, DTYPE, prepared)
    assert_codes(found.codes, (9, 2, 32))
    before = losses(weight, nearest(grouped(weight, 32), grid), grid, statistics.gram)
    assert (losses(weight, found.codes, found.grid, statistics.gram) <= before * (1 + 1e-4)).all()


def test_dead_channels_round_to_nearest_and_zero_rows_stay_zero(generator):
    x, weight = correlated_layer(generator, out_features=12)
    x[:, ::2] = 0
    weight[3] = 0
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    found = gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics, refit=False))
    moved = (found.codes != nearest(grouped(weight, 32), grid)).flatten(-2)
    assert not moved[:, ::2].any() and moved[:, 1::2].any()
    fitted = gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics))
    for result in (found, fitted):
        assert not decode(result.codes, result.grid)[3].any()


def test_inputs_that_are_all_zero_leave_the_nearest_codes(generator):
    weight = torch.randn(4, 64, generator=generator)
    grid = grid_of(weight, 32)
    statistics = Statistics(1000, torch.zeros(64, 64), torch.zeros(64), torch.zeros(64))
    found = gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics, refit=False))
    assert torch.equal(found.codes, nearest(grouped(weight, 32), grid)) and found.flips == 0


def test_rows_do_not_depend_on_the_slice_they_are_in(generator):
    x, weight = correlated_layer(generator, in_features=160, out_features=11)
    grid, prepared = grid_of(weight, 32), gptq.prepare(statistics_of(x))
    whole = gptq.round_rows(weight, grid, DTYPE, prepared)
    parts = [
        gptq.round_rows(weight[rows], Grid(grid.step[rows], grid.zero[rows]), DTYPE, prepared)
        for rows in (slice(0, 4), slice(4, 11))
    ]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.grid.step, torch.cat([part.grid.step for part in parts]))
    assert whole.flips == sum(part.flips for part in parts)


def test_a_row_that_feedback_makes_worse_gets_its_nearest_codes_back(generator, monkeypatch):
    x, weight = correlated_layer(generator, out_features=6)
    statistics, grid = statistics_of(x), grid_of(weight, 32)
    plain = nearest(grouped(weight, 32), grid)
    good = gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics))
    spoil = torch.tensor([False, True, False, False, True, False])

    def spoiled(*args, **kwargs):
        codes = good.codes.clone()
        codes[spoil] = 15 - codes[spoil]
        return codes, good.grid

    monkeypatch.setattr(gptq, "descend", spoiled)
    found = gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics))
    assert torch.equal(found.codes[spoil], plain[spoil]) and torch.equal(found.grid.step[spoil], grid.step[spoil])
    assert torch.equal(found.codes[~spoil], good.codes[~spoil])
    assert torch.equal(found.grid.step[~spoil], good.grid.step[~spoil])
    assert found.flips == int((good.codes != plain)[~spoil].sum())


@pytest.mark.parametrize("options", [{}, {"shrinkage": 0.0}])
def test_the_unit_of_the_inputs_does_not_matter_even_with_dead_channels(generator, options):
    x, weight = correlated_layer(generator)
    x[:, ::3] = 0
    grid = grid_of(weight, 32)
    large, small = (
        gptq.round_rows(weight, grid, DTYPE, gptq.prepare(statistics_of(inputs), **options))
        for inputs in (x, x * 2.0**-12)
    )
    assert torch.equal(large.codes, small.codes) and torch.equal(large.grid.step, small.grid.step)


def test_dead_channels_have_no_say_in_a_refitted_step(generator):
    x, weight = correlated_layer(generator, in_features=32)
    x[:, ::2] = 0
    grid = grid_of(weight, 32)
    prepared = gptq.prepare(statistics_of(x))
    assert (prepared.ridge > 0).all() and prepared.ridge[0] < 1e-3 * prepared.gram.diagonal().mean()
    found = gptq.round_rows(weight, grid, torch.float32, prepared)
    other = weight.clone()
    other[:, ::2] *= 0.5
    again = gptq.round_rows(other, grid, torch.float32, prepared)
    torch.testing.assert_close(found.grid.step, again.grid.step, rtol=2e-2, atol=0)


def test_a_matrix_too_ill_conditioned_for_fp32_is_factorized_exactly_in_fp64(generator):
    """Integers and a power of two, so that fp32 holds the matrix exactly: rank 40 in 64, plus 2⁻⁶."""
    x = torch.randint(-100, 101, (40, 64), generator=generator).float()
    matrix = x.T @ x + 2.0**-6 * torch.eye(64)
    assert torch.linalg.cholesky_ex(matrix).info > 0
    factor = gptq._cholesky(matrix)
    torch.testing.assert_close(factor @ factor.T, matrix.double(), atol=1e-6, rtol=0)


def test_a_slightly_indefinite_matrix_gets_a_larger_diagonal(generator):
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    matrix = ((basis * torch.linspace(1, -1e-5, 64, dtype=torch.float64)) @ basis.T).float()
    factor = gptq._cholesky(matrix)
    torch.testing.assert_close((factor @ factor.T).float(), matrix, atol=0.02, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [(2, 5), (7, 7)])
def test_a_matrix_that_is_not_finite_is_refused(bad, where):
    gram = torch.eye(8)
    gram[where] = gram[where[::-1]] = bad
    with pytest.raises(NumericsError, match="Cholesky"):
        gptq.prepare(Statistics(1000, gram, torch.ones(8), torch.zeros(8)))
