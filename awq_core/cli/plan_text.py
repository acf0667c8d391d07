"""A plan as text: identical blocks told once, names that differ only in numbers collapsed, every reason given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from awq_core.cli.collapse import collapse, ranges
from awq_core.cli.output import plural
from awq_core.plan_types import BlockPlan, LinearPlan, Plan
from awq_core.sizes import size_text

if TYPE_CHECKING:
    from awq_core.kernels.survey import Runner


def describe(plan: Plan) -> Iterator[str]:
    """The lines of `awq plan`."""
    done = [linear for linear in plan.linears if linear.quantize]
    yield f"model         {plan.model_type}, family {plan.family}, by plugin {plan.plugin} ({plan.dist} {plan.version})"
    yield f"method        {method(plan)}"
    yield f"quantized     {len(done)} of {plural(len(plan.linears), 'linear')}"
    yield f"coverage      {plan.coverage:.1%} of the parameters of the quantized blocks"
    yield f"size          {size_text(plan.bytes_before)} before, {size_text(plan.bytes_after)} after"
    yield f"peak memory   about {size_text(plan.peak_bytes)}"
    yield from _components(plan)
    yield from _groups(plan)
    yield from _head(plan)
    yield from _kept(plan)


def kernel_lines(device: str, dtype: str, kernels: Sequence[Runner]) -> Iterator[str]:
    """What will run the result on this machine, and why nothing better does."""
    if not kernels:
        return
    yield f"kernels here, on {device} in {dtype}"
    for one in kernels:
        yield f"  {one.name or 'none'}: {plural(one.linears, 'linear')}{f' ({one.why})' if one.why else ''}"
        yield from (f"    not {name}: {why}" for name, why in one.passed_over.items())


def method(plan: Plan) -> str:
    """The steps, in words."""
    config = plan.config
    size = "a whole row" if config.group_size == -1 else str(config.group_size)
    steps = [f"{config.bits} bits in groups of {size}"]
    steps += ["activation-aware scales"] if config.scale else []
    steps += [f"{config.clip} clip"] if config.clip != "none" else []
    steps += ["round to nearest" if config.rounding == "nearest" else f"{config.rounding} rounding"]
    steps += ["corrected inputs"] if config.correct_inputs else []
    steps += ["corrected biases"] if config.correct_bias else []
    steps += [] if config.needs_calibration else ["no calibration"]
    return ", ".join(steps)


def _components(plan: Plan) -> Iterator[str]:
    """Where the blocks of each component are, and what its policy is."""
    yield "components"
    for policy in plan.policies:
        blocks = [block for block in plan.blocks if block.component == policy.component]
        where = ", ".join(collapse(block.path for block in blocks)) or "no blocks"
        sizes = sorted({linear.group_size for block in blocks for linear in block.quantized})
        action = "keep" if policy.action == "keep" else "quantize"
        details = [f"groups of {', '.join(map(str, sizes))}"] if sizes else []
        details += [policy.reason] if policy.reason else []
        detail = f" ({'; '.join(details)})" if details else ""
        yield f"  {policy.component}: {action} {where}{detail}"


def _groups(plan: Plan) -> Iterator[str]:
    """Scale groups and the ones skipped, each kind of block once."""
    kinds: dict[Any, list[BlockPlan]] = {}
    for block in plan.blocks:
        if block.quantized:
            kinds.setdefault(_shape(block), []).append(block)
    if not plan.config.scale:
        yield "scale groups  not used: scales are switched off"
        return
    yield "scale groups"
    for alike in kinds.values():
        block = alike[0]
        yield f"  {_title(alike)}"
        grouped = {name for group in block.groups for name in group.layers}
        lines = []
        for group in block.groups:
            extra = f"  [compensated: {', '.join(collapse(group.compensate))}]" if group.compensate else ""
            extra += f"  [{group.shared.repeats} heads share each scale]" if group.shared else ""
            lines.append(f"{group.prev} -> {', '.join(collapse(group.layers))}{extra}")
        yield from (f"    {line}" for line in collapse(lines, linked=True))
        alone = [name for name in (_local(linear, block) for linear in block.quantized) if name not in grouped]
        if alone:
            yield f"    no scales: {', '.join(collapse(alone))}"
        reasons: dict[str, list[str]] = {}
        for skip in block.skipped:
            reasons.setdefault(skip.why, []).append(skip.where)
        skipped = [f"{where}: {why}" for why, wheres in reasons.items() for where in collapse(wheres, linked=True)]
        yield from (f"    skipped: {line}" for line in collapse(skipped, linked=True))


def _head(plan: Plan) -> Iterator[str]:
    """The output head, where it is quantized."""
    if plan.head is None:
        return
    linear = plan.head.linear
    chunks = -(-linear.out_features // plan.head.rows)
    yield "output head"
    where = f"4 bits in groups of {linear.group_size}, worked in {plural(chunks, 'row chunk')}"
    tied = f"; untied from {plan.head.tied}, which stays" if plan.head.tied else ""
    yield f"  {linear.name}: {where}{tied}"


def _shape(block: BlockPlan) -> Any:
    """What two blocks must share to be told as one: everything but their number."""
    linears = tuple(
        (_local(linear, block), linear.in_features, linear.out_features, linear.bias, linear.group_size, linear.reason)
        for linear in block.linears
    )
    return block.component, block.path.rpartition(".")[0], linears, block.groups, block.skipped


def _title(blocks: list[BlockPlan]) -> str:
    """ "language blocks 0-31", or the path of a stack that is one module."""
    _, _, number = blocks[0].path.rpartition(".")
    if not number.isdigit():
        return f"{blocks[0].component}: {blocks[0].path}"
    numbers = [int(block.path.rpartition(".")[2]) for block in blocks]
    return f"{blocks[0].component} {'block' if len(numbers) == 1 else 'blocks'} {ranges(numbers)}"


def _kept(plan: Plan) -> Iterator[str]:
    """Every linear that stays as it is, by reason."""
    reasons: dict[str, list[str]] = {}
    for linear in plan.linears:
        if not linear.quantize:
            reasons.setdefault(linear.reason, []).append(linear.name)
    if not reasons:
        return
    yield "kept linears"
    for reason, names in reasons.items():
        yield f"  {len(names)}: {reason}"
        yield from (f"    {line}" for line in collapse(names))


def _local(linear: LinearPlan, block: BlockPlan) -> str:
    """The linear's path inside its block; a block that is itself a linear goes by its own last name."""
    return block.local(linear) or block.path.rpartition(".")[2]
