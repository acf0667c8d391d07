"""One block, quantized: scales, then clips, then codes, all decided on the statistics of its inputs.

Weights stay as they were loaded until their codes are chosen; the scales found so far are two vectors a linear,

    W_eff = diag(1/rows) · W · diag(columns)

applied in fp32 when a weight is looked at. So nothing is rounded twice.

Losses are mean squared output errors in the units of the original output, tr(D H Dᵀ) / out, comparable before and
after: `loss_rtn` is plain round-to-nearest of the original weight, `loss` is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.checkpoint.pack import PackedLinear, pack_linear
from awq_core.config import QuantConfig
from awq_core.errors import NumericsError
from awq_core.planning import BlockPlan, LinearPlan
from awq_core.quantization import clip, scales
from awq_core.quantization.fold import fold_norm, fold_rows
from awq_core.quantization.rounding import decode, full_range, grouped, make_grid, nearest, round_trip
from awq_core.scale_groups import GroupPlan


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was decided for one linear; losses are None where no calibration was asked for."""

    name: str
    tokens: int
    alpha: float
    family: str
    loss_rtn: float | None
    loss: float | None
    clipped: float


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """Result of one block.

    Attributes:
        packed: checkpoint tensors by linear, named as in the model.
        changed: names, in the model, of other parameters that were modified (norms, biases, routers).
        reports: one a linear.
    """

    packed: dict[str, PackedLinear]
    changed: set[str]
    reports: list[LinearReport]


class _Weights:
    """The block's linears with their pending row and column factors."""

    def __init__(self, block: nn.Module, path: str) -> None:
        self.block = block
        self.path = path
        self.rows: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}

    def original(self, name: str) -> torch.Tensor:
        return self.block.get_parameter(f"{name}.weight").data.float()

    def effective(self, name: str) -> torch.Tensor:
        weight = self.original(name)
        if name in self.columns:
            weight = weight * self.columns[name]
        if name in self.rows:
            weight = weight / self.rows[name][:, None]
        return weight


def quantize_block(
    block: nn.Module,
    plan: BlockPlan,
    statistics: dict[str, Statistics],
    config: QuantConfig,
    step_dtype: torch.dtype,
    stored: Mapping[str, torch.dtype] | None = None,
) -> QuantizedBlock:
    """Quantize a block in place: its linears' weights become the dequantized ones, its norms absorb the scales.

    Args:
        block: materialised, on the device the search runs on.
        statistics: by path of linear relative to the block; members of a scale group share one object. Empty when
            `config.needs_calibration` is False.
        step_dtype: dtype scales are stored in (fp16 or bf16).
        stored: dtype on disk by parameter name in the model, where it is not the one the block is worked in. What is
            folded is rounded to it at once, so that the codes are chosen for the norms that will really be there.

    Raises:
        NumericsError: a weight or scale that is NaN or inf.
    """
    weights = _Weights(block, plan.path)
    changed: set[str] = set()
    chosen: dict[str, scales.ScaleResult] = {}
    seen = {name: statistic for name, statistic in statistics.items() if statistic.n}
    linears = {_local(linear, plan): linear for linear in plan.quantized}
    loss_rtn = {
        name: _rtn_loss(weights.original(name), seen[name].gram, linear.group_size, step_dtype)
        for name, linear in linears.items()
        if name in seen
    }
    for group in plan.groups if config.scale else ():
        first = group.layers[0]
        if first not in seen:
            continue
        readers = partial(map, weights.effective, group.layers)
        result = scales.search(readers, seen[first], linears[first].group_size, step_dtype)
        if not torch.isfinite(result.scale).all():
            raise NumericsError(f"{plan.path}: the scales of {group.prev} are not finite")
        seen[first].rescale_(_fold(block, weights, group, result.scale, plan, changed, stored or {}))
        chosen.update(dict.fromkeys(group.layers, result))
    packed: dict[str, PackedLinear] = {}
    reports: list[LinearReport] = []
    for name, linear in linears.items():
        statistic = seen.get(name)
        packed[linear.name], loss, clipped = _quantize_linear(weights, name, linear, statistic, config, step_dtype)
        scale = chosen.get(name)
        reports.append(
            LinearReport(
                linear.name,
                statistic.n if statistic else 0,
                scale.alpha if scale else 0.0,
                scale.family if scale else "none",
                loss_rtn.get(name),
                loss,
                clipped,
            )
        )
    return QuantizedBlock(packed, changed, reports)


def _local(linear: LinearPlan, plan: BlockPlan) -> str:
    return linear.name.removeprefix(plan.path).removeprefix(".")


def _fold(
    block: nn.Module,
    weights: _Weights,
    group: GroupPlan,
    scale: torch.Tensor,
    plan: BlockPlan,
    changed: set[str],
    stored: Mapping[str, torch.dtype],
) -> torch.Tensor:
    """Divide `prev` by `scale`, multiply its readers; returns the scale that was really applied."""
    previous = block.get_submodule(group.prev)
    prefix = f"{plan.path}.{group.prev}"
    if isinstance(previous, nn.Linear):
        divisor = fold_rows(previous.bias, previous.out_features, scale, stored.get(f"{prefix}.bias"))
        if previous.bias is not None:
            changed.add(f"{prefix}.bias")
        if any(linear.name == prefix for linear in plan.quantized):
            weights.rows[group.prev] = divisor
        else:
            _multiply(previous.weight.data, 1 / divisor[:, None], stored.get(f"{prefix}.weight"))
            changed.add(f"{prefix}.weight")
    else:
        scale = fold_norm(previous, scale, group.norm_offset, stored.get(f"{prefix}.weight"))
        changed.update(f"{prefix}.{name}" for name, _ in previous.named_parameters(recurse=False))
    for name in group.layers:
        weights.columns[name] = scale
    for name in group.compensate:
        weight = f"{plan.path}.{name}.weight"
        _multiply(block.get_parameter(f"{name}.weight").data, scale, stored.get(weight))
        changed.add(weight)
    return scale


def _multiply(weight: torch.Tensor, factor: torch.Tensor, stored: torch.dtype | None) -> None:
    """Multiply in place, rounded to the dtype the weight has on disk."""
    weight.copy_((weight.float() * factor).to(stored or weight.dtype))


def _rtn_loss(weight: torch.Tensor, gram: torch.Tensor, group_size: int, step_dtype: torch.dtype) -> float:
    """What round-to-nearest of the original weight costs, row chunk by row chunk."""
    total = sum(
        float(output_loss(round_trip(part, group_size, step_dtype).sub_(part), gram).sum())
        for part in weight.split(scales.rows_at_once(weight))
    )
    return total / weight.shape[0]


def _quantize_linear(
    weights: _Weights,
    name: str,
    plan: LinearPlan,
    statistics: Statistics | None,
    config: QuantConfig,
    step_dtype: torch.dtype,
) -> tuple[PackedLinear, float | None, float]:
    """(checkpoint tensors, loss, share of groups that were clipped); `statistics` are of the scaled input."""
    weight = weights.effective(name)
    if not torch.isfinite(weight).all():
        raise NumericsError(f"{plan.name}.weight holds NaN or inf", hint="is the source checkpoint damaged?")
    groups = grouped(weight, plan.group_size)
    lo, hi = full_range(groups)
    grid = make_grid(lo, hi, step_dtype)
    codes = nearest(groups, grid)
    loss, clipped = None, 0.0
    if statistics is not None:
        rows = weights.rows.get(name)
        loss = _loss(decode(codes, grid).flatten(-2).sub_(weight), statistics.gram, rows)
        if config.clip != "none" and plan.clip:
            tight_lo, tight_hi = clip.search(weight, statistics.gram, plan.group_size, step_dtype)
            tight = make_grid(tight_lo, tight_hi, step_dtype)
            tight_codes = nearest(groups, tight)
            tight_loss = _loss(decode(tight_codes, tight).flatten(-2).sub_(weight), statistics.gram, rows)
            # The clip is scored group by group; across groups its errors could add up to more than it saves.
            if tight_loss < loss:
                grid, codes, loss = tight, tight_codes, tight_loss
                clipped = float(((tight_lo != lo) | (tight_hi != hi)).float().mean())
    parameter = weights.block.get_parameter(f"{name}.weight")
    parameter.data = decode(codes, grid).flatten(-2).to(parameter.dtype)
    packed = pack_linear(codes.flatten(-2).to(torch.uint8), grid.step, grid.zero, step_dtype, name=plan.name)
    return packed, loss, clipped


def _loss(error: torch.Tensor, gram: torch.Tensor, rows: torch.Tensor | None) -> float:
    """tr(D H Dᵀ) / out, in the units of the original output."""
    by_row = output_loss(error, gram)
    if rows is not None:
        by_row = by_row * rows.square()
    return float(by_row.mean())
