"""One block, quantized: scales, then clips, then codes, all decided on the statistics of its inputs.

Weights stay as they were loaded until their codes are chosen; the scales found so far are two vectors a linear,

    W_eff = diag(1/rows) · W · diag(columns)

applied in fp32 when a weight is looked at. So nothing is rounded twice.

Losses are mean squared output errors in the units of the original output, tr(D H Dᵀ) / out, comparable before and
after: `loss_rtn` is plain round-to-nearest of the original weight, `loss` is what is written.
"""

from __future__ import annotations

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
) -> QuantizedBlock:
    """Quantize a block in place: its linears' weights become the dequantized ones, its norms absorb the scales.

    Args:
        block: materialised, on the device the search runs on.
        statistics: by path of linear relative to the block; members of a scale group share one object. Empty when
            `config.needs_calibration` is False.
        step_dtype: dtype scales are stored in (fp16 or bf16).

    Raises:
        NumericsError: a weight or scale that is NaN or inf.
    """
    weights = _Weights(block, plan.path)
    changed: set[str] = set()
    chosen: dict[str, scales.ScaleResult] = {}
    scaled = dict(statistics)
    if config.scale:
        size = {_local(linear, plan): linear.group_size for linear in plan.quantized}
        for group in plan.groups:
            seen = statistics.get(group.layers[0])
            if seen is None or seen.n == 0:
                continue
            result = scales.search(
                partial(map, weights.effective, group.layers), seen, size[group.layers[0]], step_dtype
            )
            if not torch.isfinite(result.scale).all():
                raise NumericsError(f"{plan.path}: the scales of {group.prev} are not finite")
            effective = _fold(block, weights, group, result.scale, plan, changed)
            after = seen.scaled(effective)
            for name in group.layers:
                chosen[name] = result
                scaled[name] = after
    packed: dict[str, PackedLinear] = {}
    reports: list[LinearReport] = []
    for linear in plan.quantized:
        name = _local(linear, plan)
        packed[linear.name], report = _quantize_linear(
            weights, name, linear, statistics.get(name), scaled.get(name), chosen.get(name), config, step_dtype
        )
        reports.append(report)
    return QuantizedBlock(packed, changed, reports)


def _local(linear: LinearPlan, plan: BlockPlan) -> str:
    return linear.name.removeprefix(plan.path).removeprefix(".")


def _fold(
    block: nn.Module, weights: _Weights, group: GroupPlan, scale: torch.Tensor, plan: BlockPlan, changed: set[str]
) -> torch.Tensor:
    """Divide `prev` by `scale`, multiply its readers; returns the scale that was really applied."""
    previous = block.get_submodule(group.prev)
    prefix = f"{plan.path}.{group.prev}"
    if isinstance(previous, nn.Linear):
        bias = previous.bias
        weights.rows[group.prev] = fold_rows(bias, previous.out_features, scale)
        if bias is not None:
            changed.add(f"{prefix}.bias")
        if not any(linear.name == prefix for linear in plan.quantized):
            previous.weight.data.div_(weights.rows.pop(group.prev)[:, None])
            changed.add(f"{prefix}.weight")
    else:
        scale = fold_norm(previous, scale, group.norm_offset)
        changed.update(f"{prefix}.{name}" for name, _ in previous.named_parameters(recurse=False))
    for name in group.layers:
        weights.columns[name] = scale
    for name in group.compensate:
        block.get_parameter(f"{name}.weight").data.mul_(scale)
        changed.add(f"{plan.path}.{name}.weight")
    return scale


def _quantize_linear(
    weights: _Weights,
    name: str,
    plan: LinearPlan,
    before: Statistics | None,
    after: Statistics | None,
    scale: scales.ScaleResult | None,
    config: QuantConfig,
    step_dtype: torch.dtype,
) -> tuple[PackedLinear, LinearReport]:
    weight = weights.effective(name)
    if not torch.isfinite(weight).all():
        raise NumericsError(f"{plan.name}.weight holds NaN or inf", hint="is the source checkpoint damaged?")
    rows = weights.rows.get(name)
    groups = grouped(weight, plan.group_size)
    lo, hi = full_range(groups)
    grid = make_grid(lo, hi, step_dtype)
    codes = nearest(groups, grid)
    loss: float | None = None
    loss_rtn: float | None = None
    clipped = 0.0
    if after is not None and before is not None and after.n:
        loss = _loss(decode(codes, grid).flatten(-2) - weight, after.gram, rows)
        if config.clip != "none" and plan.clip:
            tight_lo, tight_hi = clip.search(weight, after.gram, plan.group_size, step_dtype)
            tight = make_grid(tight_lo, tight_hi, step_dtype)
            tight_codes = nearest(groups, tight)
            tight_loss = _loss(decode(tight_codes, tight).flatten(-2) - weight, after.gram, rows)
            # The clip is scored group by group; across groups its errors could add up to more than it saves.
            if tight_loss < loss:
                grid, codes, loss = tight, tight_codes, tight_loss
                clipped = float(((tight_lo != lo) | (tight_hi != hi)).float().mean())
        original = weights.original(name)
        loss_rtn = _loss(round_trip(original, plan.group_size, step_dtype) - original, before.gram, None)
    parameter = weights.block.get_parameter(f"{name}.weight")
    parameter.data = decode(codes, grid).flatten(-2).to(parameter.dtype)
    result = pack_linear(codes.flatten(-2).to(torch.uint8), grid.step, grid.zero, step_dtype, name=plan.name)
    report = LinearReport(
        plan.name,
        after.n if after is not None else 0,
        scale.alpha if scale else 0.0,
        scale.family if scale else "none",
        loss_rtn,
        loss,
        clipped,
    )
    return result, report


def _loss(error: torch.Tensor, gram: torch.Tensor, rows: torch.Tensor | None) -> float:
    """tr(D H Dᵀ) / out, in the units of the original output."""
    by_row = output_loss(error, gram)
    if rows is not None:
        by_row = by_row * rows.square()
    return float(by_row.mean())
