"""The output head, quantized: statistics of the last hidden states, then codes, some rows at a time.

What the head reads is made by the model's own code: the model runs once more, with stubs for its blocks, the last of
which returns what the finished blocks gave. So the final norm, and whatever else lies between, needs no name here.

There is no scale group: the norm in front is not folded. Range and rounding are decided as for any linear. Rows are
independent, δ H δᵀ being a sum over them, so a chunk of rows is read, quantized and packed before the next: the head
exists whole only as 4-bit codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from awq_core.calibration.stack import StackInputs
from awq_core.calibration.statistics import Statistics, Sums
from awq_core.calibration.trace import replay
from awq_core.checkpoint.pack import PER_WORD, PackedLinear, pack_linear
from awq_core.config import QuantConfig
from awq_core.plan_types import HeadPlan
from awq_core.quantization import codes
from awq_core.quantization.block import LinearReport
from awq_core.quantization.rounding import Grid
from awq_core.quantization.scales import round_trip_loss

ReadRows = Callable[[int, int], torch.Tensor]


def observe(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    inputs: StackInputs,
    batches: Sequence[dict[str, torch.Tensor]],
    head: HeadPlan,
    device: torch.device,
) -> Statistics:
    """Statistics of the head's input, padding left out.

    Args:
        blocks: the stack before the head, all of them.
        inputs: of that stack, after the last block was advanced with `feeds` set.
        batches: the calibration batches, once more.

    Raises:
        PlanError: the model does not call its head.
        NumericsError: NaN or inf among the activations.
    """
    sums = Sums.zeros(head.linear.in_features, device)
    reader = model.get_submodule(head.linear.name)
    for hidden, mask in replay(model, blocks, inputs, batches, reader, device=device):
        sums.add(hidden, mask)
    return sums.finish(head.linear.name)


def quantize_head(
    head: HeadPlan,
    read: ReadRows,
    statistics: Statistics | None,
    config: QuantConfig,
    step_dtype: torch.dtype,
    *,
    known: Grid | None = None,
) -> tuple[PackedLinear, LinearReport]:
    """Quantize the head chunk by chunk.

    Args:
        read: (first row, row after the last) -> those rows, fp32 `[rows, in]`, on the device that works.
        statistics: of the head's input; None where nothing is calibrated.
        step_dtype: dtype scales are stored in.
        known: the grid, where an earlier run found it.

    Returns:
        Checkpoint tensors in ordinary memory, and the report.
    """
    linear = head.linear
    statistics = statistics if statistics and statistics.n else None
    groups = linear.in_features // linear.group_size
    packed = PackedLinear(
        torch.empty(linear.in_features, linear.out_features // PER_WORD, dtype=torch.int32),
        torch.empty(groups, linear.out_features // PER_WORD, dtype=torch.int32),
        torch.empty(groups, linear.out_features, dtype=step_dtype),
    )
    loss_rtn = loss = clipped = flipped = masked = 0.0
    note = ""
    for start in range(0, linear.out_features, head.rows):
        end = min(start + head.rows, linear.out_features)
        weight = result = part = None  # or those of the last chunk are in memory beside this one's
        weight = read(start, end)
        grid = Grid(known.step[start:end], known.zero[start:end]) if known else None
        result = codes.choose(weight, statistics, linear.group_size, step_dtype, config, known=grid)
        part = pack_linear(result.codes, result.grid.step, result.grid.zero, step_dtype, name=linear.name)
        words = slice(start // PER_WORD, end // PER_WORD)
        packed.qweight[:, words] = part.qweight.cpu()
        packed.qzeros[:, words] = part.qzeros.cpu()
        packed.scales[:, start:end] = part.scales.cpu()
        share = (end - start) / linear.out_features
        clipped += result.clipped * share
        flipped += result.flipped * share
        masked, note = result.masked, result.note
        if statistics is not None and result.loss is not None:
            ones = torch.ones_like(statistics.mean)
            loss_rtn += round_trip_loss(weight, ones, statistics.gram, linear.group_size, step_dtype) * share
            loss += float(result.loss.mean()) * share
    report = LinearReport(
        linear.name,
        tokens=statistics.n if statistics else 0,
        alpha=0.0,
        family="none",
        loss_rtn=loss_rtn if statistics else None,
        loss=loss if statistics else None,
        clipped=clipped,
        flipped=flipped,
        masked=masked,
        note=note,
    )
    return packed, report
