"""AWQ's scale search, on Gram statistics.

A few input channels carry large activations; their weights matter most. Multiplying those weight columns by s > 1
before rounding (and the activations by 1/s, folded into the operation before) gives them a finer share of the grid:

    loss(s) = tr(D H Dᵀ) / out,        D = Q(W·diag(s))·diag(1/s) − W            (AWQ, arXiv 2306.00978, eq. 4)

Candidates are normalised so that √(max s · min s) = 1 and made of activations and weights,

    s = E|x|^α / w̄^β,        w̄_j = mean over rows of |w_j| / max|w| in its group

on AWQ's line β = 0 and the line β = 1 − α of its duo-scaling variant, finely, and off these lines coarsely. The
identity is always one, so a group never ends worse than round-to-nearest on this loss. The losses of a
group's linears are divided by their output energy tr(W H Wᵀ) before they are added: without that, the linear with
the largest outputs decides for all. Candidates are screened on a sample of the rows and the best rescored on all.

Where input channels must have one scale (shared_heads.py), E|x| and w̄ are averaged over them first: that is E|x| and w̄
of all that one scale is multiplied with. Candidates are made of the averages and spread, so they are tied exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.gemm import screening_dtype
from awq_core.quantization.rounding import grouped, round_trip
from awq_core.shared_heads import SharedHeads

GRID = 20
COARSE = 4
RESCORED = 2
SCREEN_EVERY = 16
SCREEN_MIN_ROWS = 256
# Rows scored at once: bounds the copies of a large group, and keeps them in cache.
CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """The scales of one group.

    Attributes:
        scale: s, `[in]` fp32; ones where nothing beat the identity.
        alpha: exponent of the winner; 0.0 for the identity.
        family: "identity", "activation" (β = 0), "duo" (β = 1 − α), "grid" (neither), "salience" (E[x²]^α),
            or "reused" where an earlier run found it.
        loss: loss of the winner as a share of the output energy, summed over the linears.
        loss_identity: the same for s = 1, that is, round-to-nearest.
        losses_rtn: round-to-nearest's tr(D H Dᵀ) / out of each linear, in the order they were given.
    """

    scale: torch.Tensor
    alpha: float
    family: str
    loss: float
    loss_identity: float
    losses_rtn: tuple[float, ...]


Weights = Callable[[], Iterable[torch.Tensor]]


def search(
    weights: Weights,
    statistics: Statistics,
    group_size: int,
    step_dtype: torch.dtype,
    shared: SharedHeads | None = None,
    *,
    salience: bool = False,
) -> ScaleResult:
    """Best scales for linears that read one tensor.

    Args:
        weights: called for each pass over the linears; yields fp32 `[out_i, in]`, one at a time, so that a layer of
            many experts is never in memory in fp32 at once.
        statistics: of the shared input.
        group_size: of the quantizer.
        step_dtype: dtype scales are stored in.
        shared: which input channels have one scale; None: each has its own.
        salience: try the powers of E[x²] too, the scales of Dynamic Heuristic AWQ.
    """
    gram = statistics.gram
    rows, magnitude, mean_abs = 0, torch.zeros_like(statistics.mean_abs), statistics.mean_abs
    for weight in weights():
        rows += len(weight)
        magnitude += _magnitude(weight, group_size).sum(0)
    magnitude /= rows
    square = gram.diagonal() if salience else None
    if shared is None:
        candidates = list(_candidates(magnitude, mean_abs, square))
    else:
        pooled = (shared.pool(magnitude), shared.pool(mean_abs), None if square is None else shared.pool(square))
        candidates = [(family, alpha, shared.spread(scale)) for family, alpha, scale in _candidates(*pooled)]

    def score(weight: torch.Tensor, index: int, gram: torch.Tensor) -> float:
        return round_trip_loss(weight, candidates[index][2], gram, group_size, step_dtype)

    every = min(SCREEN_EVERY, max(1, rows // SCREEN_MIN_ROWS))
    screen_gram = gram.to(screening_dtype(gram.device)) if every > 1 else gram
    energy: list[float] = []
    by_linear: list[list[float]] = [[] for _ in candidates]
    for weight in weights():
        sample = weight[::every].contiguous()
        energy.append(max(float(output_loss(sample, gram).mean()), 1e-20))
        for index, losses in enumerate(by_linear):
            losses.append(score(sample, index, screen_gram))
    total = [_relative(losses, energy) for losses in by_linear]
    finalists = [0, *sorted(range(1, len(candidates)), key=total.__getitem__)[:RESCORED]]
    if every > 1:
        for index in finalists:
            by_linear[index] = []
        for weight in weights():
            for index in finalists:
                by_linear[index].append(score(weight, index, gram))
    loss = {index: _relative(by_linear[index], energy) for index in finalists}
    best = min(finalists, key=loss.__getitem__)
    family, alpha, scale = candidates[best]
    return ScaleResult(scale, alpha, family, loss[best], loss[0], tuple(by_linear[0]))


def reused(scale: torch.Tensor) -> ScaleResult:
    """Scales that an earlier run found; their losses are not known here."""
    return ScaleResult(scale, 0.0, "reused", math.nan, math.nan, ())


def _relative(losses: Iterable[float], energy: Iterable[float]) -> float:
    """Losses of the linears as shares of their output energy, added up."""
    return sum(loss / total for loss, total in zip(losses, energy, strict=True))


def _magnitude(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """|w| relative to the largest of its group, `[out, in]`."""
    groups = grouped(weight.abs(), group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(-2)


def _candidates(
    magnitude: torch.Tensor, mean_abs: torch.Tensor, square: torch.Tensor | None = None
) -> Iterator[tuple[str, float, torch.Tensor]]:
    """(family, alpha, s): the identity first, both lines, the grid off them, powers of E[x²] if given; s is `[in]`."""
    yield "identity", 0.0, torch.ones_like(mean_abs)
    x = mean_abs.clamp(min=1e-5)
    w = magnitude.clamp(min=1e-4)
    for step in range(1, GRID + 1):
        alpha = step / GRID
        yield "activation", alpha, _normalised(x**alpha, mean_abs)
    for step in range(GRID):
        alpha = step / GRID
        yield "duo", alpha, _normalised(x**alpha / w ** (1 - alpha), mean_abs)
    for i, j in product(range(1, COARSE + 1), repeat=2):
        if i + j != COARSE:
            alpha, beta = i / COARSE, j / COARSE
            yield "grid", alpha, _normalised(x**alpha / w**beta, mean_abs)
    if square is not None:
        for step in range(1, GRID + 1):
            alpha = step / GRID
            yield "salience", alpha, _normalised(square.clamp(min=1e-5) ** alpha, mean_abs)


def _normalised(scale: torch.Tensor, mean_abs: torch.Tensor) -> torch.Tensor:
    """√(max·min) = 1; channels that are never active keep s = 1, so a dead channel cannot stretch the range."""
    alive = mean_abs > 0
    live = scale[alive] if alive.any() else scale
    scale = scale / (live.max() * live.min()).sqrt()
    return torch.where(alive & torch.isfinite(scale), scale.clamp(1e-4, 1e4), torch.ones_like(scale))


def round_trip_loss(
    weight: torch.Tensor, scale: torch.Tensor, gram: torch.Tensor, group_size: int, step_dtype: torch.dtype
) -> float:
    """tr(D H Dᵀ) / out of one linear rounded to nearest under `scale`, in the dtype of `gram`."""
    total = 0.0
    for part in weight.split(max(1, CHUNK_ELEMENTS // weight.shape[1])):
        error = round_trip(part * scale, group_size, step_dtype).div_(scale).sub_(part)
        total += float(output_loss(error.to(gram.dtype), gram).float().sum())
    return total / len(weight)
