"""One block, quantized: scales, then clips, then codes, all decided on the statistics of its inputs.

The block stays as it was loaded until everything is decided; the scales found so far are two vectors a linear,

    W_eff = diag(1/rows) · W · diag(columns)

applied in fp32 when a weight is looked at. So nothing is rounded twice, and statistics may be collected part by part:
each part is of the block as it was, and a linear's are dropped as soon as its codes are chosen.

Losses are mean squared output errors in the units of the original output, tr(D H Dᵀ) / out, comparable before and
after: `loss_rtn` is plain round-to-nearest of the original weight, `loss` is what is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.checkpoint.pack import PackedLinear, dequantize, pack_linear
from awq_core.config import QuantConfig
from awq_core.errors import NumericsError
from awq_core.gemm import times_transposed
from awq_core.plan_types import BlockPlan, LinearPlan
from awq_core.quantization import codes, correction, scales
from awq_core.quantization.fold import fold_norm, fold_rows, tied
from awq_core.quantization.reuse import Found
from awq_core.quantization.rounding import round_trip
from awq_core.scale_groups import GroupPlan


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was decided for one linear; losses are None where no calibration was asked for. `clipped` is a share of
    groups, `flipped` of codes, `masked` of input channels; `note` says why another rounding was used. `routed`: of
    `tokens`, those that the router sends to the expert whose linear this is; None outside a mixture's experts."""

    name: str
    tokens: int
    alpha: float
    family: str
    loss_rtn: float | None
    loss: float | None
    clipped: float
    flipped: float = 0.0
    masked: float = 0.0
    note: str = ""
    routed: int | None = None


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """Result of one block.

    Attributes:
        packed: checkpoint tensors by linear, named as in the model.
        changed: names, in the model, of other parameters that were modified (norms, biases, routers).
        reports: one a linear.
        scales: s of each scale group, `[in]` fp32, by the path in the model of what absorbs it.
    """

    packed: dict[str, PackedLinear]
    changed: set[str]
    reports: list[LinearReport]
    scales: dict[str, torch.Tensor]


class _Weights:
    """The block's linears with their pending row and column factors, and its other parameters that will change."""

    def __init__(self, block: nn.Module, path: str) -> None:
        self.block = block
        self.path = path
        self.steps: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}
        self.folded: dict[str, torch.Tensor] = {}

    def target(self, name: str) -> torch.Tensor:
        """The original weight, corrected for what has become of its input."""
        weight = self.block.get_parameter(f"{name}.weight").data.float()
        return weight + times_transposed(weight, self.steps[name]) if name in self.steps else weight

    def effective(self, name: str) -> torch.Tensor:
        weight = self.target(name)
        if name in self.columns:
            weight = weight * self.columns[name]
        if name in self.rows:
            weight = weight / self.rows[name][:, None]
        return weight

    def changed(self, name: str) -> torch.Tensor:
        """A parameter of the block as it will be, to be changed in place."""
        if name not in self.folded:
            self.folded[name] = self.block.get_parameter(name).data.clone()
        return self.folded[name]


def quantize_block(
    block: nn.Module,
    plan: BlockPlan,
    statistics: Iterable[dict[str, Statistics]],
    config: QuantConfig,
    step_dtype: torch.dtype,
    stored: Mapping[str, torch.dtype] | None = None,
    found: Found | None = None,
    drifted: Mapping[str, torch.Tensor] | None = None,
) -> QuantizedBlock:
    """Quantize a block in place: its linears' weights become the dequantized ones, its norms absorb the scales.

    Args:
        block: materialised, on the device the search runs on.
        statistics: in parts, each by path of linear relative to the block; members of a scale group share one object.
            The block is unchanged until the last part was asked for. Empty when `config.needs_calibration` is False.
        step_dtype: dtype scales are stored in (fp16 or bf16).
        stored: dtype on disk by parameter name in the model, where it is not the one the block is worked in. What is
            folded is rounded to it at once, so that the codes are chosen for the norms that will really be there.
        found: scales and ranges of an earlier run, taken instead of searching.
        drifted: D of `correction.py` by linear, for those whose input is corrected for.

    Raises:
        NumericsError: a weight or scale that is NaN or inf.
    """
    weights = _Weights(block, plan.path)
    linears = {plan.local(linear): linear for linear in plan.quantized}
    waiting = list(plan.groups) if config.scale else []
    folded: list[GroupPlan] = []  # before any statistics
    chosen: dict[str, scales.ScaleResult] = {}
    kept: dict[str, torch.Tensor] = {}
    loss_rtn: dict[str, float] = {}
    seen: dict[str, Statistics] = {}
    observed: set[str] = set()
    packed: dict[str, PackedLinear] = {}
    reports: dict[str, LinearReport] = {}

    def rtn_loss(name: str, statistic: Statistics) -> float:
        """Round-to-nearest of the original weight; the input may be scaled by now, in both or in neither."""
        weight, size = weights.target(name), linears[name].group_size
        columns = weights.columns.get(name, torch.ones_like(statistic.mean))
        total = 0.0
        for part in weight.split(max(1, scales.CHUNK_ELEMENTS // weight.shape[1])):
            error = round_trip(part, size, step_dtype).sub_(part).mul_(columns)
            total += float(output_loss(error, statistic.gram).sum())
        return total / len(weight)

    def finish(name: str, statistic: Statistics | None) -> None:
        linear, scale = linears[name], chosen.get(name)
        if statistic is not None and (statistic.own is not None or name not in loss_rtn):
            statistic = statistic.with_own(weights.columns.get(name))
            loss_rtn[name] = rtn_loss(name, statistic)
        absorbs = config.correct_bias and linear.bias and statistic is not None
        if statistic is not None and absorbs:
            statistic = statistic.centered()
        packed[name], result, loss = _quantize_linear(weights, name, linear, statistic, config, step_dtype, found)
        if statistic is not None and absorbs:
            error = dequantize(packed[name]).to(statistic.mean.device).sub_(weights.effective(name))
            bias, on_disk = weights.changed(f"{name}.bias"), (stored or {}).get(f"{linear.name}.bias")
            bias.copy_((bias.float() - error @ statistic.mean).to(on_disk or bias.dtype))
        reports[name] = LinearReport(
            linear.name,
            statistic.n if statistic else 0,
            scale.alpha if scale else 0.0,
            scale.family if scale else "none",
            loss_rtn.get(name),
            loss,
            result.clipped,
            result.flipped,
            result.masked,
            result.note,
            statistic.routed if statistic else None,
        )

    def fold(group: GroupPlan, result: scales.ScaleResult) -> torch.Tensor:
        if not torch.isfinite(result.scale).all():
            raise NumericsError(f"{plan.path}: the scales of {group.prev} are not finite")
        chosen.update(dict.fromkeys(group.layers, result))
        kept[f"{plan.path}.{group.prev}"] = result.scale
        return _fold(block, weights, group, result.scale, plan, stored or {})

    if found is not None:
        for group in waiting:
            fold(group, scales.reused(found.scale(f"{plan.path}.{group.prev}", like=weights.target(group.layers[0]))))
        folded, waiting = waiting, []
    for part in statistics:
        observed.update(part)
        for name in [name for name, statistic in part.items() if statistic.n]:
            seen[name] = part[name]
        weights.steps |= correction.steps(drifted or {}, part, config.correct_inputs)
        for group in [group for group in folded if not part.keys().isdisjoint(group.layers)]:
            name = next(name for name in group.layers if name in part)
            part[name].rescale_(weights.columns[name])  # once: experts that come later have the same tensors
            folded.remove(group)
        del part  # or it keeps its Gram matrices alive beside those of the next
        while waiting and waiting[0].layers[0] in observed:
            group = waiting.pop(0)
            first = group.layers[0]
            if first not in seen:
                continue
            readers = partial(map, weights.effective, group.layers)
            size, salience = linears[first].group_size, config.rounding == "heuristic"
            result = scales.search(readers, seen[first], size, step_dtype, group.shared, salience=salience)
            for name, loss in zip(group.layers, result.losses_rtn, strict=True):
                loss_rtn[name] = rtn_loss(name, seen[first]) if name in weights.rows else loss
            seen[first].rescale_(fold(group, result))
        undecided = {name for group in waiting for name in (group.prev, *group.layers)}
        for name in [name for name in linears if name in seen and name not in undecided]:
            finish(name, seen.pop(name))
    for name in linears:
        if name not in packed:
            finish(name, None)
    for name, value in weights.folded.items():
        block.get_parameter(name).data = value
    for name, tensors in packed.items():
        weight = block.get_parameter(f"{name}.weight").data
        weight.copy_(dequantize(tensors, weight.dtype))  # in its own memory: new tensors would fragment the heap
    return QuantizedBlock(
        {linear.name: packed[name] for name, linear in linears.items()},
        {f"{plan.path}.{name}" for name in weights.folded},
        [reports[name] for name in linears],
        kept,
    )


def _fold(
    block: nn.Module,
    weights: _Weights,
    group: GroupPlan,
    scale: torch.Tensor,
    plan: BlockPlan,
    stored: Mapping[str, torch.dtype],
) -> torch.Tensor:
    """Note `prev` divided by `scale` and its readers multiplied; returns the scale that was really applied."""
    previous = block.get_submodule(group.prev)
    prefix = f"{plan.path}.{group.prev}"
    if isinstance(previous, nn.Linear):
        bias = None if previous.bias is None else weights.changed(f"{group.prev}.bias")
        own, scale = tied(group, scale)
        divisor = fold_rows(bias, previous.out_features, own, stored.get(f"{prefix}.bias"))
        if any(linear.name == prefix for linear in plan.quantized):
            weights.rows[group.prev] = divisor
        else:
            _multiply(weights.changed(f"{group.prev}.weight"), 1 / divisor[:, None], stored.get(f"{prefix}.weight"))
    else:
        norm = copy.deepcopy(previous)
        scale = fold_norm(norm, scale, group.norm_offset, stored.get(f"{prefix}.weight"))
        weights.folded.update((f"{group.prev}.{name}", p.data) for name, p in norm.named_parameters(recurse=False))
    for name in group.layers:
        weights.columns[name] = scale
    for name in group.compensate:
        _multiply(weights.changed(f"{name}.weight"), scale, stored.get(f"{plan.path}.{name}.weight"))
    return scale


def _multiply(weight: torch.Tensor, factor: torch.Tensor, stored: torch.dtype | None) -> None:
    """Multiply in place, rounded to the dtype the weight has on disk."""
    weight.copy_((weight.float() * factor).to(stored or weight.dtype))


def _quantize_linear(
    weights: _Weights,
    name: str,
    plan: LinearPlan,
    statistics: Statistics | None,
    config: QuantConfig,
    step_dtype: torch.dtype,
    found: Found | None,
) -> tuple[PackedLinear, codes.Codes, float | None]:
    """(checkpoint tensors, what was chosen, loss in the units of the original output); `statistics` are of the scaled
    input."""
    weight = weights.effective(name)
    if not torch.isfinite(weight).all():
        raise NumericsError(f"{plan.name}.weight holds NaN or inf", hint="is the source checkpoint damaged?")
    groups = weight.shape[1] // plan.group_size
    clipping = plan.clip and config.clip != "none"
    known = found.grid(plan.name, groups, weight.device) if found and clipping else None
    result = codes.choose(weight, statistics, plan.group_size, step_dtype, config, clipping=clipping, known=known)
    packed = pack_linear(result.codes, result.grid.step, result.grid.zero, step_dtype, name=plan.name)
    if result.loss is None:
        return packed, result, None
    rows = weights.rows.get(name)
    return packed, result, float((result.loss if rows is None else result.loss * rows.square()).mean())
