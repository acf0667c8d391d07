"""Which units get more bits, when not all can: a knapsack, solved by a price.

Unit u costs c_u (its share of the damage) at 4 bits and nothing at 16, where it takes e_u bytes more. With `room` bytes

    max Σ c_u x_u        Σ e_u x_u <= room        x_u in {0, 1}

At a price λ a byte, every unit decides alone: x_u = 1 where c_u > λ e_u. As λ falls, units join in the order of
c_u / e_u, and every solution met on the way is optimal for the room it takes (Everett, 1963). Falling until the next
unit does not fit leaves less than one unit of room. That is repaired greedily: what still fits is taken, then one or
two units are exchanged for others as long as that is worth something. The result is within one unit of the room, and
no worse than half of the optimum; in practice it is the optimum or very near.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def allocate(cost: Sequence[float], extra: Sequence[int], room: int) -> list[bool]:
    """For each unit, whether it gets the bytes.

    Args:
        cost: of leaving the unit as it is, >= 0.
        extra: bytes it would take, > 0.
        room: bytes there are, >= 0; the chosen take no more, and none that is left out would still fit.
    """
    order = sorted(range(len(cost)), key=lambda u: (-cost[u] / extra[u], u))
    taken: set[int] = set()
    left = _fill(order, extra, taken, room)
    dearest = max((u for u in order if extra[u] <= room), key=lambda u: cost[u], default=None)
    if dearest is not None and cost[dearest] > sum(cost[u] for u in taken):
        taken = {dearest}
        left = _fill(order, extra, taken, room - extra[dearest])
    while swap := _better(cost, extra, taken, left):
        out, into = swap
        taken = (taken - set(out)) | set(into)
        left = _fill(order, extra, taken, left + sum(extra[u] for u in out) - sum(extra[u] for u in into))
    return [u in taken for u in range(len(cost))]


def _fill(order: Sequence[int], extra: Sequence[int], taken: set[int], left: int) -> int:
    """Take what fits, dearest a byte first; returns the room that is left."""
    for u in order:
        if u not in taken and extra[u] <= left:
            taken.add(u)
            left -= extra[u]
    return left


def _better(
    cost: Sequence[float], extra: Sequence[int], taken: set[int], left: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The exchange that gains most: one for one, one for two or two for one. None where none gains.

    Units that cannot be told apart in size are compared by their best alone: of each size, the few cheapest that are in
    and the few dearest that are out.
    """
    inside = _foremost(sorted(taken, key=lambda u: cost[u]), extra)
    outside = _foremost(sorted(set(range(len(cost))) - taken, key=lambda u: -cost[u]), extra)
    ones, pairs = ([(u,) for u in inside], list(combinations(inside, 2)))
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    gained = 1e-12 * sum(cost)
    for out in [*ones, *pairs]:
        room, lost = left + sum(extra[u] for u in out), sum(cost[u] for u in out)
        candidates = [(u,) for u in outside] + ([*combinations(outside, 2)] if len(out) == 1 else [])
        for into in candidates:
            gain = sum(cost[u] for u in into) - lost
            if gain > gained and sum(extra[u] for u in into) <= room:
                best, gained = (out, into), gain
    return best


def _foremost(order: Sequence[int], extra: Sequence[int], of_each: int = 2) -> list[int]:
    """The first two of each size."""
    seen: dict[int, int] = {}
    chosen = []
    for u in order:
        seen[extra[u]] = seen.get(extra[u], 0) + 1
        if seen[extra[u]] <= of_each:
            chosen.append(u)
    return chosen
