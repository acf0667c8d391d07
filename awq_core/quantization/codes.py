"""Codes of one linear, its scales decided: a range for every group, then a level for every weight.

Ranges are judged by rounding to nearest, and a row keeps narrowed ones only if they lower its error; the method that
was asked for then rounds on the grid they give.

Rows are independent given the statistics of the input, so they are worked a few at a time: memory stays small and the
weights stay in cache from the first look at a range to the last error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.config import QuantConfig
from awq_core.quantization import clip, gptq, greedy, heuristic
from awq_core.quantization.rounded import Rounded
from awq_core.quantization.rounding import Grid, decode, full_range, grouped, make_grid, nearest

# Rows worked at once: bounds the copies of a large linear.
CHUNK_ELEMENTS = 1 << 22

METHODS = {"heuristic": heuristic, "greedy": greedy, "gptq": gptq}
RoundRows = Callable[[torch.Tensor, Grid], Rounded]


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized linear, or some rows of one.

    Attributes:
        codes: levels 0..15, `[out, in]` uint8.
        grid: step and zero point of every group.
        loss: δ H δᵀ of each row, `[out]`, in the units of the scaled weight; None without statistics.
        clipped: share of groups whose range was narrowed.
        flipped: share of codes that are not the nearest.
        masked: share of input channels whose codes might not flip.
        note: why another rounding was used than the one asked for; else empty.
    """

    codes: torch.Tensor
    grid: Grid
    loss: torch.Tensor | None
    clipped: float = 0.0
    flipped: float = 0.0
    masked: float = 0.0
    note: str = ""


def choose(
    weight: torch.Tensor,
    statistics: Statistics | None,
    group_size: int,
    step_dtype: torch.dtype,
    config: QuantConfig,
    *,
    clipping: bool = True,
    known: Grid | None = None,
) -> Codes:
    """Quantize fp32 `[out, in]`, already scaled.

    Args:
        statistics: of the scaled input; None where nothing is known of it, which leaves round-to-nearest.
        group_size: of this linear.
        step_dtype: dtype steps are stored in.
        config: what clip and which rounding.
        clipping: False for a linear whose role forbids it.
        known: the grid, where it is decided already.
    """
    gram = None if statistics is None else statistics.gram
    search = clipping and config.clip != "none" and known is None
    round_rows = _method(config, statistics, step_dtype)
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts: list[Codes] = []
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows]
        full = full_range(grouped(part, group_size))
        grid = _rows(known, start, rows) if known else make_grid(*full, step_dtype)
        clipped, loss = 0.0, None
        if gram is not None and search:
            narrow = clip.search(part, gram, group_size, step_dtype, symmetric=config.clip == "symmetric")
            grid, better, loss = _better_rows(part, grid, make_grid(*narrow, step_dtype), gram)
            changed = (narrow[0] != full[0]) | (narrow[1] != full[1])
            clipped = float((changed & better[:, None]).float().mean())
        found = round_rows(part, grid)
        if gram is not None and (loss is None or found.method != "nearest"):
            loss = _loss(part, found.codes, found.grid, gram)
        flipped = found.flips / part.numel()
        codes = found.codes.flatten(-2).to(torch.uint8)
        parts.append(Codes(codes, found.grid, loss, clipped, flipped, found.masked, found.note))
    return _join(parts)


def _method(config: QuantConfig, statistics: Statistics | None, step_dtype: torch.dtype) -> RoundRows:
    """The rounding that was asked for, as a function of rows and their grid."""
    if statistics is None or config.rounding == "nearest":
        return _nearest
    method = METHODS[config.rounding]
    options: dict[str, float] = {}
    if method is heuristic:
        options = {"max_flip_percent": config.max_flip_percent, "knee_tolerance": config.knee_tolerance}
    prepared = method.prepare(statistics, **options)
    return lambda weight, grid: method.round_rows(weight, grid, step_dtype, prepared)


def _nearest(weight: torch.Tensor, grid: Grid) -> Rounded:
    codes = nearest(grouped(weight, weight.shape[1] // grid.step.shape[1]), grid)
    return Rounded(codes, grid, 0, 0.0, "nearest")


def _better_rows(
    weight: torch.Tensor, full: Grid, narrow: Grid, gram: torch.Tensor
) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """The grid that rounds each row better, where that is the narrow one, and the loss with it; `[out]` both.

    The clip is scored group by group; across the groups of a row its errors could add up to more than it saves.
    """
    full_loss, narrow_loss = (_loss(weight, _nearest(weight, grid).codes, grid, gram) for grid in (full, narrow))
    better = narrow_loss < full_loss
    column = better[:, None]
    grid = Grid(torch.where(column, narrow.step, full.step), torch.where(column, narrow.zero, full.zero))
    return grid, better, torch.minimum(full_loss, narrow_loss)


def _loss(weight: torch.Tensor, codes: torch.Tensor, grid: Grid, gram: torch.Tensor) -> torch.Tensor:
    """δ H δᵀ of each row, `[out]`."""
    return output_loss(decode(codes, grid).flatten(-2).sub_(weight), gram)


def _rows(grid: Grid, start: int, rows: int) -> Grid:
    return Grid(grid.step[start : start + rows], grid.zero[start : start + rows])


def _join(parts: list[Codes]) -> Codes:
    total = sum(len(part.codes) for part in parts)

    def mean(field: str) -> float:
        return sum(getattr(part, field) * len(part.codes) for part in parts) / total

    losses = [part.loss for part in parts if part.loss is not None]
    return Codes(
        torch.cat([part.codes for part in parts]),
        Grid(torch.cat([part.grid.step for part in parts]), torch.cat([part.grid.zero for part in parts])),
        torch.cat(losses) if losses else None,
        mean("clipped"),
        mean("flipped"),
        parts[0].masked,
        parts[0].note,
    )
