"""AWQ's scale search, on Gram statistics.

A few input channels carry large activations; their weights matter most. Multiplying those weight columns by s > 1
before rounding (and the activations by 1/s, folded into the operation before) gives them a finer share of the grid:

    loss(s) = tr(D H Dᵀ) / out,        D = Q(W·diag(s))·diag(1/s) − W            (AWQ, arXiv 2306.00978, eq. 4)

Candidates follow AWQ and its duo-scaling variant on a grid of α, normalised so that √(max s · min s) = 1:

    s = E|x|^α        and        s = E|x|^α / w̄^(1−α),     w̄_j = mean over rows of |w_j| / max|w| in its group

and the identity is always one, so a group never ends worse than round-to-nearest on this loss. The losses of a
group's linears are divided by their output energy tr(W H Wᵀ) before they are added: without that, the linear with
the largest outputs decides for all. Candidates are screened on every eighth row and the best rescored on all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.quantization.rounding import grouped, round_trip

GRID = 20
RESCORED = 4
SCREEN_EVERY = 8
SCREEN_MIN_ROWS = 256
# Rows scored at once: bounds the copies of a large group, and keeps them in cache.
CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True)
class ScaleResult:
    """The scales of one group.

    Attributes:
        scale: s, `[in]` fp32; ones where nothing beat the identity.
        alpha: exponent of the winner; 0.0 for the identity.
        family: "identity", "activation" or "duo".
        loss: energy-normalised loss of the winner, summed over the linears.
        loss_identity: the same for s = 1, that is, round-to-nearest.
    """

    scale: torch.Tensor
    alpha: float
    family: str
    loss: float
    loss_identity: float


Weights = Callable[[], Iterable[torch.Tensor]]


def search(weights: Weights, statistics: Statistics, group_size: int, step_dtype: torch.dtype) -> ScaleResult:
    """Best scales for linears that read one tensor.

    Args:
        weights: called for each pass over the linears; yields fp32 `[out_i, in]`, one at a time, so that a layer of
            many experts is never in memory in fp32 at once.
        statistics: of the shared input.
        group_size: of the quantizer.
        step_dtype: dtype scales are stored in.
    """
    gram = statistics.gram
    total = sum(weight.shape[0] for weight in weights())
    every = min(SCREEN_EVERY, max(1, total // SCREEN_MIN_ROWS))
    row_weights: list[torch.Tensor] = []
    sample: list[torch.Tensor] = []
    magnitude = torch.zeros_like(statistics.mean_abs)
    for weight in weights():
        energy = sum(float(output_loss(part, gram).sum()) for part in weight.split(rows_at_once(weight)))
        row_weights.append(torch.full((weight.shape[0],), 1 / max(energy, 1e-20), device=weight.device))
        sample.append(weight[::every].clone())
        magnitude += _magnitude(weight, group_size).sum(0)
    candidates = list(_candidates(magnitude / total, statistics.mean_abs))

    screen_gram = gram.to(_screen_dtype(gram)) if every > 1 else gram
    screen = [0.0] * len(candidates)
    for weight, row_weight in zip(sample, row_weights, strict=True):
        for index, (_, _, scale) in enumerate(candidates):
            screen[index] += _loss(weight, row_weight[::every], scale, screen_gram, group_size, step_dtype)
    finalists = [0, *sorted(range(1, len(candidates)), key=screen.__getitem__)[:RESCORED]]
    losses = {index: screen[index] for index in finalists}
    if every > 1:
        losses = dict.fromkeys(finalists, 0.0)
        for weight, row_weight in zip(weights(), row_weights, strict=True):
            for index in finalists:
                losses[index] += _loss(weight, row_weight, candidates[index][2], gram, group_size, step_dtype)
    best = min(losses, key=losses.__getitem__)
    family, alpha, scale = candidates[best]
    return ScaleResult(scale, alpha, family, losses[best], losses[0])


def rows_at_once(weight: torch.Tensor) -> int:
    """How many rows of `[out, in]` to score in one go."""
    return max(1, CHUNK_ELEMENTS // weight.shape[1])


def _screen_dtype(gram: torch.Tensor) -> torch.dtype:
    """bf16 where it is much faster: its errors, below 1e-3 of a loss, only decide who is rescored in fp32."""
    fast = gram.device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _magnitude(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """|w| relative to the largest of its group, `[out, in]`."""
    groups = grouped(weight.abs(), group_size)
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-6)).flatten(-2)


def _candidates(magnitude: torch.Tensor, mean_abs: torch.Tensor) -> Iterator[tuple[str, float, torch.Tensor]]:
    """(family, alpha, s): the identity first, then both families over the grid; all `[in]`."""
    yield "identity", 0.0, torch.ones_like(mean_abs)
    x = mean_abs.clamp(min=1e-5)
    w = magnitude.clamp(min=1e-4)
    for step in range(1, GRID + 1):
        alpha = step / GRID
        yield "activation", alpha, _normalised(x**alpha, mean_abs)
    for step in range(GRID):
        alpha = step / GRID
        yield "duo", alpha, _normalised(x**alpha / w ** (1 - alpha), mean_abs)


def _normalised(scale: torch.Tensor, mean_abs: torch.Tensor) -> torch.Tensor:
    """√(max·min) = 1; channels that are never active keep s = 1, so a dead channel cannot stretch the range."""
    alive = mean_abs > 0
    live = scale[alive] if alive.any() else scale
    scale = scale / (live.max() * live.min()).sqrt()
    return torch.where(alive & torch.isfinite(scale), scale.clamp(1e-4, 1e4), torch.ones_like(scale))


def _loss(
    weight: torch.Tensor,
    row_weight: torch.Tensor,
    scale: torch.Tensor,
    gram: torch.Tensor,
    group_size: int,
    step_dtype: torch.dtype,
) -> float:
    total = 0.0
    for part, part_weight in zip(
        weight.split(rows_at_once(weight)), row_weight.split(rows_at_once(weight)), strict=True
    ):
        error = round_trip(part * scale, group_size, step_dtype).div_(scale).sub_(part)
        total += float((output_loss(error.to(gram.dtype), gram).float() * part_weight).sum())
    return total
