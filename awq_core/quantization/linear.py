"""One linear, quantized: its weight with what is pending on it, and codes for it.

The scales found so far are two vectors, and what makes up for the drift of its input one matrix (`correction.py`):

    W_eff = diag(1/rows) · (W + W·stepᵀ) · diag(columns)

applied in fp32 when the weight is looked at, so that nothing is rounded twice. What is done here depends on the fields
of `LinearWork` alone, and writes to none of them: it may be done in another thread or on another machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from awq_core.calibration.statistics import Statistics, output_loss
from awq_core.checkpoint.pack import PackedLinear, dequantize, pack_linear
from awq_core.config import QuantConfig
from awq_core.errors import NumericsError
from awq_core.gemm import times_transposed
from awq_core.plan_types import LinearPlan
from awq_core.quantization import codes
from awq_core.quantization.rounding import Grid, round_trip


@dataclass(frozen=True, slots=True)
class Pending:
    """A weight `[out, in]` as it was loaded, and what is pending on it: `step` `[in, in]`, `columns` `[in]`, `rows`
    `[out]`, all fp32."""

    original: torch.Tensor
    step: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def target(self) -> torch.Tensor:
        """The original weight, corrected for what has become of its input, `[out, in]` fp32."""
        weight = self.original.float()
        return weight if self.step is None else weight + times_transposed(weight, self.step)

    def effective(self) -> torch.Tensor:
        """The weight that is quantized, `[out, in]` fp32."""
        weight = self.target()
        if self.columns is not None:
            weight = weight * self.columns
        if self.rows is not None:
            weight = weight / self.rows[:, None]
        return weight


@dataclass(frozen=True, slots=True)
class LinearWork:
    """What the codes of one linear are chosen from.

    Attributes:
        statistics: of the scaled input; None where nothing is known of it.
        known: the grid, where an earlier run found it.
        loss_rtn: of round-to-nearest, where it is known already.
        absorbs: a bias absorbs the mean of the rounding error.
    """

    plan: LinearPlan
    weight: Pending
    statistics: Statistics | None
    config: QuantConfig
    step_dtype: torch.dtype
    known: Grid | None
    loss_rtn: float | None
    absorbs: bool


@dataclass(frozen=True, slots=True)
class LinearDone:
    """What was chosen for one linear; losses are in the units of the original output, None without statistics.
    `absorbed`: the mean of the rounding error, `[out]` fp32, for the bias to take off. The others are those of
    `block.LinearReport`."""

    packed: PackedLinear
    tokens: int
    routed: int | None
    loss_rtn: float | None
    loss: float | None
    clipped: float
    flipped: float
    masked: float
    note: str
    absorbed: torch.Tensor | None


def quantize_linear(work: LinearWork) -> LinearDone:
    """Choose range and codes of one linear.

    Raises:
        NumericsError: its weight holds NaN or inf.
    """
    plan, statistics, loss_rtn = work.plan, work.statistics, work.loss_rtn
    if statistics is not None and (statistics.own is not None or loss_rtn is None):
        statistics = statistics.with_own(work.weight.columns)
        loss_rtn = rtn_loss(work.weight, statistics, plan.group_size, work.step_dtype)
    absorbs = work.absorbs and statistics is not None
    if statistics is not None and absorbs:
        statistics = statistics.centered()
    weight = work.weight.effective()
    if not torch.isfinite(weight).all():
        raise NumericsError(f"{plan.name}.weight holds NaN or inf", hint="is the source checkpoint damaged?")
    clipping = plan.clip and work.config.clip != "none"
    choice = codes.choose(
        weight, statistics, plan.group_size, work.step_dtype, work.config, clipping=clipping, known=work.known
    )
    packed = pack_linear(choice.codes, choice.grid.step, choice.grid.zero, work.step_dtype, name=plan.name)
    loss, rows = choice.loss, work.weight.rows
    if loss is not None and rows is not None:
        loss = loss * rows.square()
    absorbed = None
    if statistics is not None and absorbs:
        error = dequantize(packed).to(statistics.mean.device).sub_(weight)
        absorbed = error @ statistics.mean
    return LinearDone(
        packed,
        statistics.n if statistics else 0,
        statistics.routed if statistics else None,
        loss_rtn,
        None if loss is None else float(loss.mean()),
        choice.clipped,
        choice.flipped,
        choice.masked,
        choice.note,
        absorbed,
    )


def rtn_loss(weight: Pending, statistics: Statistics, group_size: int, step_dtype: torch.dtype) -> float:
    """Round-to-nearest of the original weight; the input may be scaled by now, in both or in neither."""
    target = weight.target()
    columns = torch.ones_like(statistics.mean) if weight.columns is None else weight.columns
    total = 0.0
    for part in target.split(max(1, codes.CHUNK_ELEMENTS // target.shape[1])):
        error = round_trip(part, group_size, step_dtype).sub_(part).mul_(columns)
        total += float(output_loss(error, statistics.gram).sum())
    return total / len(target)
