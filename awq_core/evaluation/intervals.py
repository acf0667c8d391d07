"""95 % confidence intervals of statistics over windows of text, by the bootstrap.

Tokens of one window depend on one another, windows of a long text hardly do. So windows are drawn, with replacement and
as many as there are; the statistic is taken of each draw, and the interval reaches from the 2.5 % to the 97.5 %
quantile of those values. It needs no formula for a statistic's spread; for a 99.9 % quantile there is none to trust.
With fewer than about ten windows it is too narrow. Source: Efron and Tibshirani, An Introduction to the Bootstrap,
1993, section 13.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

Interval: TypeAlias = tuple[float, float]
Statistic: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

DRAWS = 500
LEVEL = 0.95


def quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """Linear between the nearest two, as `torch.quantile`, which takes no more than 16 million values."""
    flat = values.flatten()
    rank = q * (len(flat) - 1)
    low = int(rank)
    pair = torch.stack([flat.kthvalue(min(k, len(flat))).values for k in (low + 1, low + 2)])
    return pair[0] + (rank - low) * (pair[1] - pair[0])


def p999(values: torch.Tensor) -> torch.Tensor:
    """99.9 % quantile of everything."""
    return quantile(values, 0.999)


def bootstrap(
    values: torch.Tensor, statistic: Statistic = torch.mean, *, draws: int = DRAWS, seed: int = 0
) -> Interval | None:
    """The interval of `statistic` over `[windows, ...]` values; None with one window. The same for the same seed."""
    count = len(values)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(count, (count,), generator=generator) for _ in range(draws))
    found = torch.stack([statistic(values[windows]) for windows in drawn]).double()
    low, high = (float(quantile(found, q)) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return low, high
