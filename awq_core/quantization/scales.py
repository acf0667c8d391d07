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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import torch

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.gemm import screening_dtype
from awq_core.quantization.linear import Pending
from awq_core.quantization.rounding import grouped, round_trip
from awq_core.quantization.spread import Spread, here
from awq_core.shared_heads import SharedHeads

GRID = 20
COARSE = 4
RESCORED = 2
SCREEN_EVERY = 16
SCREEN_MIN_ROWS = 256
# Rows scored at once: bounds the copies of a large group, and keeps them in cache.
CHUNK_ELEMENTS = 1 << 22

Candidate = tuple[str, float, float, torch.Tensor]  # family, α, β, s


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """The scales of one group.

    Attributes:
        scale: s, `[in]` fp32; ones where nothing beat the identity.
        alpha, beta: exponents of the winner; 0.0 for the identity.
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
    beta: float = 0.0


@dataclass(frozen=True, slots=True)
class Readers:
    """A group to search: linears that read one tensor, `[out_i, in]`; statistics of that; the quantizer's group size;
    which input channels have one scale (None: each has its own)."""

    weights: tuple[Pending, ...]
    statistics: Statistics
    group_size: int
    shared: SharedHeads | None = None


@dataclass(frozen=True, slots=True)
class _Scoring:
    """Candidates `[candidates, in]` for one linear, scored on every `every`-th row."""

    weight: Pending
    gram: torch.Tensor
    candidates: torch.Tensor
    every: int
    group_size: int
    step_dtype: torch.dtype


def search_all(
    groups: Sequence[Readers], step_dtype: torch.dtype, *, salience: bool = False, spread: Spread = here
) -> list[ScaleResult]:
    """Best scales of each group; what one finds changes no weight of another.

    Args:
        step_dtype: dtype scales are stored in.
        salience: try the powers of E[x²] too, the scales of Dynamic Heuristic AWQ.
        spread: does the work, linear by linear: a layer of many experts is never in memory in fp32 at once.
    """
    sums = spread(_magnitudes, ((weight, group.group_size) for group in groups for weight in group.weights))
    candidates = [list(_of_group(group, islice(sums, len(group.weights)), salience)) for group in groups]
    stacked = [torch.stack([scale for *_, scale in those]) for those in candidates]
    steps = [min(SCREEN_EVERY, max(1, _rows(group) // SCREEN_MIN_ROWS)) for group in groups]

    def scorings(index: int, those: torch.Tensor, every: int) -> Iterator[_Scoring]:
        group = groups[index]
        for weight in group.weights:
            yield _Scoring(weight, group.statistics.gram, those, every, group.group_size, step_dtype)

    screened = spread(_screen, (one for i, those in enumerate(stacked) for one in scorings(i, those, steps[i])))
    energies: list[list[float]] = []
    losses: list[list[tuple[float, ...]]] = []  # by group, by candidate, by linear
    finalists: list[list[int]] = []
    for group, those in zip(groups, candidates, strict=True):
        energy, by_linear = zip(*islice(screened, len(group.weights)), strict=True)
        energies.append(list(energy))
        losses.append(list(zip(*by_linear, strict=True)))
        total = [_relative(found, energy) for found in losses[-1]]
        finalists.append([0, *sorted(range(1, len(those)), key=total.__getitem__)[:RESCORED]])
    sampled = [i for i, every in enumerate(steps) if every > 1]
    best_of = {i: stacked[i][finalists[i]] for i in sampled}
    rescored = spread(_score, (one for i in sampled for one in scorings(i, best_of[i], 1)))
    for i in sampled:
        again = zip(*islice(rescored, len(groups[i].weights)), strict=True)
        for index, found in zip(finalists[i], again, strict=True):
            losses[i][index] = found
    return [_best(*found) for found in zip(candidates, finalists, losses, energies, strict=True)]


def search(
    weights: Iterable[Pending],
    statistics: Statistics,
    group_size: int,
    step_dtype: torch.dtype,
    shared: SharedHeads | None = None,
    *,
    salience: bool = False,
) -> ScaleResult:
    """Best scales for linears that read one tensor; `search_all` and `Readers` say what the arguments are."""
    return search_all([Readers(tuple(weights), statistics, group_size, shared)], step_dtype, salience=salience)[0]


def _best(
    candidates: list[Candidate], finalists: list[int], losses: list[tuple[float, ...]], energy: list[float]
) -> ScaleResult:
    loss = {index: _relative(losses[index], energy) for index in finalists}
    best = min(finalists, key=loss.__getitem__)
    family, alpha, beta, scale = candidates[best]
    return ScaleResult(scale, alpha, family, loss[best], loss[0], losses[0], beta)


def _rows(group: Readers) -> int:
    return sum(len(weight.original) for weight in group.weights)


def _of_group(group: Readers, sums: Iterable[torch.Tensor], salience: bool) -> Iterator[Candidate]:
    """The candidates of a group, of the sum of each linear's magnitudes over its rows."""
    statistics, shared = group.statistics, group.shared
    magnitude = torch.zeros_like(statistics.mean_abs)
    for one in sums:
        magnitude += one
    magnitude /= _rows(group)
    square = statistics.gram.diagonal() if salience else None
    if shared is None:
        yield from _candidates(magnitude, statistics.mean_abs, square)
        return
    pooled = (shared.pool(magnitude), shared.pool(statistics.mean_abs), None if square is None else shared.pool(square))
    for name, alpha, beta, scale in _candidates(*pooled):
        yield name, alpha, beta, shared.spread(scale)


def _magnitudes(item: tuple[Pending, int]) -> torch.Tensor:
    weight, group_size = item
    return _magnitude(weight.effective(), group_size).sum(0)


def _screen(scoring: _Scoring) -> tuple[float, list[float]]:
    """(output energy of a linear on a sample of its rows, the sample's loss under each candidate)."""
    every, gram = scoring.every, scoring.gram
    sample = scoring.weight.effective()[::every].contiguous()
    energy = max(float(output_loss(sample, gram).mean()), 1e-20)
    return energy, _losses(sample, gram.to(screening_dtype(gram.device)) if every > 1 else gram, scoring)


def _score(scoring: _Scoring) -> list[float]:
    """A linear's loss under each candidate, on all rows."""
    return _losses(scoring.weight.effective(), scoring.gram, scoring)


def _losses(weight: torch.Tensor, gram: torch.Tensor, scoring: _Scoring) -> list[float]:
    size, dtype = scoring.group_size, scoring.step_dtype
    return [round_trip_loss(weight, scale, gram, size, dtype) for scale in scoring.candidates]


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
) -> Iterator[Candidate]:
    """(family, α, β, s): the identity first, both lines, the grid off them, powers of E[x²] if given; s is `[in]`."""
    yield "identity", 0.0, 0.0, torch.ones_like(mean_abs)
    x = mean_abs.clamp(min=1e-5)
    w = magnitude.clamp(min=1e-4)
    for step in range(1, GRID + 1):
        alpha = step / GRID
        yield "activation", alpha, 0.0, _normalised(x**alpha, mean_abs)
    for step in range(GRID):
        alpha = step / GRID
        yield "duo", alpha, 1 - alpha, _normalised(x**alpha / w ** (1 - alpha), mean_abs)
    for i, j in product(range(1, COARSE + 1), repeat=2):
        if i + j != COARSE:
            alpha, beta = i / COARSE, j / COARSE
            yield "grid", alpha, beta, _normalised(x**alpha / w**beta, mean_abs)
    if square is not None:
        for step in range(1, GRID + 1):
            alpha = step / GRID
            yield "salience", alpha, 0.0, _normalised(square.clamp(min=1e-5) ** alpha, mean_abs)


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
