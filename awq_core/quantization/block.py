"""One block, quantized: scales, then clips, then codes, all decided on the statistics of its inputs.

The block stays as it was loaded until everything is decided; the scales found so far are two vectors a linear
(`linear.py`). So nothing is rounded twice, and statistics may be collected part by part: each part is of the block as
it was, and a linear's are dropped as soon as its codes are chosen. Groups that do not wait for one another are searched
together, and linears quantized together, by whoever `spread` names (`spread.py`).

Losses are mean squared output errors in the units of the original output, tr(D H Dᵀ) / out, comparable before and
after: `loss_rtn` is plain round-to-nearest of the original weight, `loss` is what is written.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from awq_core.calibration.statistics import Statistics
from awq_core.checkpoint.pack import PackedLinear, dequantize
from awq_core.config import QuantConfig
from awq_core.errors import NumericsError
from awq_core.plan_types import BlockPlan
from awq_core.quantization import correction, scales
from awq_core.quantization.fold import fold_group_norm, fold_rows, tied
from awq_core.quantization.linear import LinearWork, Pending, quantize_linear, rtn_loss
from awq_core.quantization.reuse import Found
from awq_core.quantization.spread import Spread, here
from awq_core.scale_groups import GroupPlan


@dataclass(frozen=True, slots=True)
class LinearReport:
    """What was decided for one linear; losses are None where no calibration was asked for. `clipped` is a share of
    groups, `flipped` of codes, `masked` of input channels; `note` says why another rounding was used. `routed`: of
    `tokens`, those that the router sends to the expert whose linear this is; None outside a mixture's experts. `alpha`
    and `beta` are the exponents of `scales.py`."""

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
    beta: float = 0.0


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
    """What is pending on the block's linears, and its other parameters that will change."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.steps: dict[str, torch.Tensor] = {}
        self.rows: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}
        self.folded: dict[str, torch.Tensor] = {}

    def pending(self, name: str) -> Pending:
        """A linear's weight with what is pending on it by now."""
        original = self.block.get_parameter(f"{name}.weight").data
        return Pending(original, self.steps.get(name), self.columns.get(name), self.rows.get(name))

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
    spread: Spread = here,
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
        spread: does the work of linears that do not wait for one another.

    Raises:
        NumericsError: a weight or scale that is NaN or inf.
    """
    weights = _Weights(block)
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

    def work(name: str) -> LinearWork:
        linear, statistic = linears[name], seen.pop(name, None)
        clipping = linear.clip and config.clip != "none"
        groups, device = linear.in_features // linear.group_size, block.get_parameter(f"{name}.weight").device
        known = found.grid(linear.name, groups, device) if found and clipping else None
        absorbs = config.correct_bias and linear.bias
        pending, loss = weights.pending(name), loss_rtn.get(name)
        return LinearWork(linear, pending, statistic, config, step_dtype, known, loss, absorbs)

    def finish(names: list[str]) -> None:
        for name, done in zip(names, spread(quantize_linear, map(work, names)), strict=True):
            linear, scale = linears[name], chosen.get(name)
            packed[name] = done.packed
            if done.absorbed is not None:
                bias, on_disk = weights.changed(f"{name}.bias"), (stored or {}).get(f"{linear.name}.bias")
                bias.copy_((bias.float() - done.absorbed).to(on_disk or bias.dtype))
            reports[name] = LinearReport(
                linear.name,
                done.tokens,
                scale.alpha if scale else 0.0,
                scale.family if scale else "none",
                done.loss_rtn,
                done.loss,
                done.clipped,
                done.flipped,
                done.masked,
                done.note,
                done.routed,
                scale.beta if scale else 0.0,
            )

    def fold(group: GroupPlan, result: scales.ScaleResult) -> torch.Tensor:
        if not torch.isfinite(result.scale).all():
            raise NumericsError(f"{plan.path}: the scales of {group.prev} are not finite")
        chosen.update(dict.fromkeys(group.layers, result))
        kept[f"{plan.path}.{group.prev}"] = result.scale
        return _fold(block, weights, group, result.scale, plan, stored or {})

    def find(groups: list[GroupPlan]) -> None:
        firsts = [group.layers[0] for group in groups]
        readers = [
            scales.Readers(
                tuple(map(weights.pending, group.layers)), seen[first], linears[first].group_size, group.shared
            )
            for group, first in zip(groups, firsts, strict=True)
        ]
        results = scales.search_all(readers, step_dtype, salience=config.rounding == "heuristic", spread=spread)
        for group, one, result in zip(groups, readers, results, strict=True):
            for name, pending, loss in zip(group.layers, one.weights, result.losses_rtn, strict=True):
                late = pending.rows is not None  # then the search began with a weight that is not the original
                loss_rtn[name] = rtn_loss(pending, one.statistics, one.group_size, step_dtype) if late else loss
            one.statistics.rescale_(fold(group, result))

    if found is not None:
        for group in waiting:
            like = block.get_parameter(f"{group.layers[0]}.weight")
            fold(group, scales.reused(found.scale(f"{plan.path}.{group.prev}", like=like)))
        folded, waiting = waiting, []
    for part in statistics:
        observed.update(part)
        for name in [name for name, statistic in part.items() if statistic.n]:
            seen[name] = part[name]
        weights.steps |= correction.steps(drifted or {}, part, config.correct_inputs or 0.0)
        for group in [group for group in folded if not part.keys().isdisjoint(group.layers)]:
            name = next(name for name in group.layers if name in part)
            part[name].rescale_(weights.columns[name])  # once: experts that come later have the same tensors
            folded.remove(group)
        del part  # or it keeps its Gram matrices alive beside those of the next
        while ready := _ready(waiting, observed):
            del waiting[: len(ready)]
            find([group for group in ready if group.layers[0] in seen])
        undecided = {name for group in waiting for name in (group.prev, *group.layers)}
        finish([name for name in linears if name in seen and name not in undecided])
    finish([name for name in linears if name not in packed])
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


def _ready(waiting: list[GroupPlan], observed: set[str]) -> list[GroupPlan]:
    """The next groups whose statistics are there and whose linears no group among them changes."""
    ready: list[GroupPlan] = []
    changed: set[str] = set()
    for group in waiting:
        if group.layers[0] not in observed or not changed.isdisjoint(group.layers):
            break
        ready.append(group)
        changed.update((group.prev, *group.layers))
    return ready


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
        divisor = fold_rows(bias, previous.out_features, own, stored.get(f"{prefix}.bias"), group.sections)
        if any(linear.name == prefix for linear in plan.quantized):
            weights.rows[group.prev] = divisor
        else:
            _multiply(weights.changed(f"{group.prev}.weight"), 1 / divisor[:, None], stored.get(f"{prefix}.weight"))
    else:
        norm = copy.deepcopy(previous)
        scale = fold_group_norm(norm, group, scale, stored.get(f"{prefix}.weight"))
        weights.folded.update((f"{group.prev}.{name}", p.data) for name, p in norm.named_parameters(recurse=False))
    for name in group.layers:
        weights.columns[name] = scale
    for name in group.compensate:
        _multiply(weights.changed(f"{name}.weight"), scale, stored.get(f"{plan.path}.{name}.weight"))
    return scale


def _multiply(weight: torch.Tensor, factor: torch.Tensor, stored: torch.dtype | None) -> None:
    """Multiply in place, rounded to the dtype the weight has on disk."""
    weight.copy_((weight.float() * factor).to(stored or weight.dtype))
