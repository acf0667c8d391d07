"""The record of a run that has just ended, of its plan and its reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from awq_core.calibration.batches import CalibrationData
from awq_core.plan_types import LinearPlan, Plan
from awq_core.quantization.block import LinearReport
from awq_core.quantization.proof import Proof
from awq_core.report.record import Record, Row
from awq_core.version import __version__

STEP_BITS, ZERO_BITS = 16, 4
LIBRARIES = ("torch", "transformers")  # whose versions the bytes may depend on


def record_of(
    model: str,
    plan: Plan,
    proof: Proof,
    reports: Iterable[LinearReport],
    data: CalibrationData | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    itemsize: int,
    reused: bool = False,
    target: str = "",
) -> Record:
    """The record of a run.

    Args:
        model: as the caller named it; of a path, the last name is kept.
        data: what the run was calibrated on, if on anything.
        dtype: of activations.
        itemsize: bytes a weight of what is kept.
        reused: whether scales were taken from an earlier run.
        target: the size asked for, in words; empty without one.
    """
    calibration: dict[str, Any] = {"reused": True} if reused else {}
    if data is not None:
        calibration |= {"source": data.source, "samples": data.samples, "tokens": data.tokens}
        calibration |= {"mixture": dict(data.mixture)} if data.mixture else {}
    found = {report.name: report for report in reports}
    places = [(linear, block.component, block.path) for block in plan.blocks for linear in block.linears]
    places += [(linear, "", linear.name) for linear in plan.outside]
    rows = tuple(
        _row(linear, component, block, found.get(linear.name), itemsize) for linear, component, block in places
    )
    return Record(
        model=Path(model).name or model,
        family=plan.family,
        plugin=plan.plugin,
        dist=plan.dist,
        versions={"awq-core": __version__, plan.dist: plan.version, **{name: version(name) for name in LIBRARIES}},
        config=plan.config.to_dict(),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        calibration=calibration,
        target=target,
        proof_groups=proof.groups,
        proof_error=proof.error,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        coverage=plan.coverage,
        rows=rows,
    )


def _row(linear: LinearPlan, component: str, block: str, report: LinearReport | None, itemsize: int) -> Row:
    bits = 4 + (STEP_BITS + ZERO_BITS) / linear.group_size if linear.quantize else 8.0 * itemsize
    shape = (linear.name, component, block, linear.in_features, linear.out_features, round(bits, 4))
    if report is None:
        return Row(*shape, kept=linear.reason)
    values = {one.name: getattr(report, one.name) for one in fields(report) if one.name != "name"}
    for name in ("loss_rtn", "loss"):  # JSON has no infinity
        values[name] = values[name] if values[name] is not None and math.isfinite(values[name]) else None
    return Row(*shape, **values)
