"""The knapsack of mixed precision against every possible choice."""

import random
from itertools import product

import pytest

from awq_core.allocation import allocate


def cases(count, most):
    chance = random.Random(0)
    for _ in range(count):
        n = chance.randint(1, most)
        sizes = (
            [chance.randint(1, 40) for _ in range(n)]
            if chance.random() < 0.5
            else [[3, 7, 11][i % 3] for i in range(n)]
        )
        cost = [chance.choice((0.0, chance.random(), chance.expovariate(0.1))) for _ in range(n)]
        yield cost, sizes, chance.randint(0, sum(sizes))


def value(cost, chosen):
    return sum(c for c, one in zip(cost, chosen, strict=True) if one)


def size(extra, chosen):
    return sum(e for e, one in zip(extra, chosen, strict=True) if one)


def test_against_every_choice():
    ratios = []
    for cost, extra, room in cases(150, 10):
        chosen = allocate(cost, extra, room)
        assert size(extra, chosen) <= room
        left = room - size(extra, chosen)
        assert all(one or more > left for more, one in zip(extra, chosen, strict=True)), "something would still fit"
        every = product((False, True), repeat=len(cost))
        best = max(value(cost, one) for one in every if size(extra, one) <= room)
        ratios.append(value(cost, chosen) / best if best else 1.0)
    assert min(ratios) > 0.9
    assert sum(ratio > 1 - 1e-9 for ratio in ratios) > 0.9 * len(ratios)


def test_at_least_half_of_the_optimum_where_density_misleads():
    assert allocate([2.0, 9.0], [1, 10], 10) == [False, True]


def test_an_exchange_fills_what_density_leaves():
    """By density: 6 first, then nothing fits; the two others are worth more together."""
    assert allocate([7.0, 5.0, 5.0], [6, 5, 5], 10) == [False, True, True]


@pytest.mark.parametrize(("room", "chosen"), [(0, [False, False]), (6, [True, False]), (10, [True, True])])
def test_limits(room, chosen):
    assert allocate([1.0, 0.0], [5, 5], room) == chosen


def test_nothing_to_choose_from():
    assert allocate([], [], 10) == []


def test_the_same_choice_every_time():
    cost, extra = [1.0] * 40, [5] * 40
    assert allocate(cost, extra, 52) == allocate(cost, extra, 52) == [True] * 10 + [False] * 30
