"""Coordinate descent against brute force over codes, and refitted steps against least squares on tokens."""

import itertools

import pytest
import torch

from awq_core.quantization.descent import descend
from awq_core.quantization.rounding import SMALLEST_STEP, Grid, decode, grouped, nearest

from .conftest import statistics_of
from .layers import assert_codes, correlated_layer, grid_of, losses

NO_RIDGE = torch.zeros(64)


def ridged(gram, ridge):
    return gram + torch.diag(ridge)


@pytest.mark.parametrize("columns", [4, 5])
def test_on_nearly_independent_inputs_it_finds_the_best_of_all_codes(generator, columns):
    """Weak coupling, so that single changes suffice; the codes that are tried are those within the weights' reach."""
    weight = torch.randn(6, columns, generator=generator) * 1.2
    mixing = torch.randn(columns, columns, generator=generator) * 0.03
    gram = torch.eye(columns) + (mixing + mixing.T) / 2
    grid = Grid(torch.ones(6, 1), torch.full((6, 1), 8.0))
    start = torch.full((6, 1, columns), 3.0)
    codes, _ = descend(weight, start, grid, gram, torch.zeros(columns), torch.float32, sweeps=8, refit=False)
    every = torch.tensor(list(itertools.product(range(4, 13), repeat=columns)), dtype=torch.float32)[:, None]
    for row in range(6):
        one = Grid(torch.ones(len(every), 1), torch.full((len(every), 1), 8.0))
        best = every[losses(weight[row : row + 1].expand(len(every), -1), every, one, gram).argmin()]
        assert torch.equal(codes[row], best)


@pytest.mark.parametrize(("size", "ridge"), [(8, 0.0), (16, 0.7)])
def test_where_it_stops_no_single_code_does_better(generator, size, ridge):
    x, weight = correlated_layer(generator, in_features=16, out_features=5, rank=4)
    gram, grid, extra = statistics_of(x).gram, grid_of(weight, size), torch.full((16,), ridge)
    codes, same = descend(
        weight, nearest(grouped(weight, size), grid), grid, gram, extra, torch.float16, sweeps=30, refit=False
    )
    assert torch.equal(same.step, grid.step)
    loss = losses(weight, codes, grid, ridged(gram, extra))
    for column, code in itertools.product(range(16), range(16)):
        other = codes.flatten(-2).clone()
        other[:, column] = code
        assert (losses(weight, grouped(other, size), grid, ridged(gram, extra)) >= loss * (1 - 1e-6)).all()


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("in_features", "size"), [(64, 16), (160, 160), (256, 64)])
def test_every_sweep_lowers_the_loss(generator, in_features, size, refit):
    """160 and 256 columns: more than one block, the last one short, groups across blocks."""
    x, weight = correlated_layer(generator, in_features=in_features, rank=20)
    gram, ridge = statistics_of(x).gram, torch.rand(in_features, generator=generator) * 0.1
    grid = grid_of(weight, size, torch.bfloat16)
    codes, total = nearest(grouped(weight, size), grid), [torch.full((9,), torch.inf)]
    for _ in range(4):
        total.append(losses(weight, codes, grid, ridged(gram, ridge)))
        assert (total[-1] <= total[-2] * (1 + 1e-6)).all()
        codes, grid = descend(weight, codes, grid, gram, ridge, torch.bfloat16, sweeps=1, refit=refit)
        assert_codes(codes, (9, in_features // size, size))
        assert torch.equal(grid.step, grid.step.bfloat16().float())
    assert total[-1].sum() < 0.7 * total[1].sum()


def test_several_sweeps_are_that_many_single_ones(generator):
    x, weight = correlated_layer(generator, in_features=160)
    gram, grid = statistics_of(x).gram, grid_of(weight, 32)
    start = nearest(grouped(weight, 32), grid)
    ridge = torch.full((160,), 0.05)
    at_once = descend(weight, start, grid, gram, ridge, torch.float16, sweeps=3, refit=True)
    one_by_one = start, grid
    for _ in range(3):
        one_by_one = descend(weight, *one_by_one, gram, ridge, torch.float16, sweeps=1, refit=True)
    assert torch.equal(at_once[0], one_by_one[0]) and torch.equal(at_once[1].step, one_by_one[1].step)


@pytest.mark.parametrize(("out_features", "size"), [(9, 32), (1, 32), (9, 64), (1, 64)])
def test_what_it_is_given_stays_as_it_was(generator, out_features, size):
    x, weight = correlated_layer(generator, out_features=out_features)
    grid = grid_of(weight, size)
    start = nearest(grouped(weight, size), grid)
    copies = weight.clone(), start.clone(), grid.step.clone()
    codes, fitted = descend(weight, start, grid, statistics_of(x).gram, NO_RIDGE, torch.float16, sweeps=1, refit=True)
    assert all(torch.equal(a, b) for a, b in zip(copies, (weight, start, grid.step), strict=True))
    assert not torch.equal(codes, start) and not torch.equal(fitted.step, grid.step)


@pytest.mark.parametrize("ridge", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_refitted_step_is_the_least_squares_step_on_tokens(generator, dtype, ridge):
    """Weights near the grid of another step, so that only the refit acts. Two groups: the second is fitted to what the
    first leaves. A ridge is as good as one more token a channel."""
    x = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    units = torch.randint(1, 7, (1, 16), generator=generator).float()
    codes, grid = grouped(units + 8, 8), Grid(torch.tensor([[0.1, 0.1]]), torch.full((1, 2), 8.0))
    weight = units * 0.1 * torch.tensor([1.03] * 8 + [0.97] * 8) + 0.002 * torch.randn(1, 16, generator=generator)
    gram, found = statistics_of(x).gram, grid.step[0].double()
    x = torch.cat([x.double(), (200 * ridge) ** 0.5 * torch.eye(16, dtype=torch.float64)])
    for g in (0, 1):
        columns = slice(8 * g, 8 * g + 8)
        left = x @ (weight.double() - units.double() * found.repeat_interleave(8))[0]
        mine = x[:, columns] @ units[0, columns].double()
        found[g] += torch.linalg.lstsq(mine[:, None], left[:, None]).solution[0, 0]
        found[g] = found[g].to(dtype).double()
    fitted_codes, fitted = descend(weight, codes, grid, gram, torch.full((16,), ridge), dtype, sweeps=1, refit=True)
    assert torch.equal(fitted_codes, codes)
    torch.testing.assert_close(fitted.step[0].double(), found, rtol=1e-5, atol=0)
    assert (fitted.step != 0.1).all() and torch.equal(fitted.step, fitted.step.to(dtype).float())


def test_a_refit_that_rounding_spoils_is_not_taken():
    """The best step lies between two of the dtype, the nearer of them worse than the step that is there."""
    gram = torch.eye(1)
    near_half = 1 + 2.0**-8 * 0.9  # bf16 has 1 and 1 + 2⁻⁷
    weight, codes = torch.tensor([[near_half]]), torch.tensor([[[9.0]]])
    grid = Grid(torch.tensor([[near_half + 1e-4]]), torch.tensor([[8.0]]))
    _, fitted = descend(weight, codes, grid, gram, torch.zeros(1), torch.bfloat16, sweeps=1, refit=True)
    assert torch.equal(fitted.step, grid.step)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_groups_that_cannot_be_refitted_keep_their_step(generator, dtype):
    weight = torch.zeros(3, 32)
    weight[1, :16] = torch.randn(16, generator=generator)
    weight[2] = 1e6  # an fp16 step would overflow
    grid = Grid(torch.full((3, 2), 2.0**-10), torch.zeros(3, 2))
    codes = torch.zeros(3, 2, 16)
    codes[2] = 15
    gram = torch.eye(32)
    found, fitted = descend(weight, codes, grid, gram, torch.full((32,), 0.1), dtype, sweeps=2, refit=True)
    assert torch.isfinite(fitted.step).all() and (fitted.step > 0).all()
    assert torch.equal(fitted.step[0], grid.step[0]) and not found[0].any()
    assert (fitted.step[2] == 2.0**-10).all() == (dtype is torch.float16)
    error = decode(found, fitted).flatten(-2) - weight
    assert (error.square().sum(-1) <= (decode(codes, grid).flatten(-2) - weight).square().sum(-1)).all()


def test_a_step_never_becomes_negative():
    """Codes on the wrong side of zero: the best step for them would be negative."""
    weight, codes = torch.full((1, 4), -0.5), torch.full((1, 1, 4), 10.0)
    grid = Grid(torch.tensor([[0.25]]), torch.tensor([[8.0]]))
    _, fitted = descend(weight, codes, grid, torch.eye(4), torch.zeros(4), torch.float32, sweeps=1, refit=True)
    assert float(fitted.step) == SMALLEST_STEP
