"""The model card: a README.md that says how a checkpoint was made, and from what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.subsets import shares
from awq_core.plan_types import HeadPlan, Plan
from awq_core.quantization.block import LinearReport
from awq_core.quantization.proof import Proof
from awq_core.sizes import size_text
from awq_core.version import __version__

TEMPLATE = """\
---
base_model: {base}
library_name: transformers
tags: [awq, 4-bit, int4]
---

# {name}, AWQ 4-bit

Made from `{base}` with awq-core {version} and {dist} {dist_version}.

| | |
|---|---|
| format | AWQ "gemm": 4-bit codes, zero points, groups of {group} |
| method | {method} |
| calibration | {calibration} |
| size | {before} before, {after} after |
| quantized | {quantized} linears, {coverage:.1%} of the parameters of the quantized blocks |
| scale groups | proved on a tiny model of this class before quantization: outputs moved by {error:.0e} |
{loss}{head}
## Kept as they were

{kept}
{report}
## Use

```python
import awq_core
model = awq_core.load("{name}")
```

```
vllm serve {name}
```
"""


HEAD = """
## The output head is quantized

`{name}` is 4-bit, which most AWQ checkpoints leave out. `awq_core.load` reads it. vLLM and SGLang are told of it by
`"lm_head": true` in config.json, and read it with their Marlin kernels where their code for this model allows that;
their plain `awq` kernels do not. transformers (5.23) never does: it **fills the head with random numbers**, with no
more than a warning.
"""


def model_card(
    base: str,
    plan: Plan,
    proof: Proof,
    reports: Sequence[LinearReport],
    data: CalibrationData | None,
    *,
    reused: bool = False,
    report: str = "",
) -> str:
    """The text of README.md; `report` is the section that `awq_core.report` fills."""
    config = plan.config
    steps = [
        "activation-aware scales" if config.scale else "no scales",
        f"{config.clip} clip" if config.clip != "none" else "no clip",
        "round to nearest" if config.rounding == "nearest" else f"{config.rounding} rounding",
    ]
    steps += [f"inputs corrected by {config.correct_inputs:g}"] if config.correct_inputs else []
    steps += ["biases corrected"] if config.correct_bias else []
    calibration = f"{data.samples} samples, {data.tokens} tokens: {data.source}" if data else "none"
    if data and data.mixture:
        calibration += f"; {shares(data.mixture)} of the tokens"
    name = Path(base).name or base
    quantized = sum(linear.quantize for linear in plan.linears)
    loss = ""
    if data is not None and reports:
        rtn = sum(r.loss_rtn or 0.0 for r in reports)
        ours = sum(r.loss or 0.0 for r in reports)
        loss = f"| output error | {ours / rtn if rtn else 1:.3f} of round-to-nearest's, summed over linears |\n"
    return TEMPLATE.format(
        base=name,
        name=name,
        version=__version__,
        dist=plan.dist,
        dist_version=plan.version,
        group=config.group_size if config.group_size != -1 else "a whole row",
        method=", ".join(steps),
        calibration=f"{calibration}; scales of an earlier run" if reused else calibration,
        before=size_text(plan.bytes_before),
        after=size_text(plan.bytes_after),
        quantized=quantized,
        coverage=plan.coverage,
        error=max(proof.error, 1e-9),
        loss=loss,
        head=_head(plan),
        kept=_kept(plan),
        report=f"\n{report}\n" if report else "",
    )


def head_note(head: HeadPlan) -> str:
    """What a quantized output head means, in a line."""
    linear = head.linear
    text = f"the output head {linear.name} is 4-bit too: many engines cannot load that"
    if head.tied:
        size = linear.in_features * linear.out_features // 2
        text += f"; untied from {head.tied}, which stays, so that it adds about {size_text(size)}"
    return text


def _head(plan: Plan) -> str:
    return "" if plan.head is None else HEAD.format(name=plan.head.linear.name)


def _kept(plan: Plan) -> str:
    reasons: dict[str, list[str]] = {}
    for linear in plan.linears:
        if not linear.quantize:
            reasons.setdefault(linear.reason, []).append(linear.name)
    lines = [
        f"- {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {r}" for r, names in reasons.items()
    ]
    return "\n".join([*lines, "- embeddings and norms"])
