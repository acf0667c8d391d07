"""The plan: what will happen to every weight, and why, decided before any weight is read.

    configuration + plugin + skeleton  ->  blocks, each with its linears and its resolved scale groups

A linear is quantized unless a rule keeps it, and every rule leaves its reason in the plan: the component's policy, a
group size that does not divide its inputs, a router that must stay exact. The linears of one scale group share a
fate, because engines fuse them (q/k/v, gate/up) and a fused pair cannot be half quantized.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from awq_core.config import QuantConfig
from awq_core.errors import ConfigError, PlanError
from awq_core.hooks.manager import Owner, PluginManager
from awq_core.hooks.types import ComponentPolicy, LayerStack, ScaleGroup
from awq_core.output_head import head_name, plan_head, working_bytes
from awq_core.passes import gram_bytes
from awq_core.plan_types import BlockPlan, HeadPlan, LinearPlan, Plan
from awq_core.scale_groups import Skip, expand, resolve_groups
from awq_core.skeleton import matrices

GIB = 1 << 30


def make_plan(
    model: nn.Module,
    owner: Owner,
    manager: PluginManager,
    config: QuantConfig,
    *,
    calibration_tokens: int = 128 * 512,
    itemsize: int = 2,
) -> Plan:
    """Decide every weight's fate on a skeleton (after `awq_prepare_model`).

    Args:
        model: the skeleton; only names and shapes are read.
        calibration_tokens: for the memory estimate.
        itemsize: bytes of one stored weight.

    Raises:
        PlanError: a declared path that matches nothing, two groups that claim one tensor.
        ConfigError: a component the model does not have; an output head that cannot be quantized as asked.
    """
    stacks = tuple(manager.layer_stacks(owner, model))
    policies = _policies(owner, manager, model, stacks, config)
    blocks: list[BlockPlan] = []
    for stack in stacks:
        policy = policies[stack.component]
        for path, block, index in stack_blocks(model, stack):
            groups = manager_groups(manager, owner, model, stack, block, index)
            keep = groups_owner(manager, owner, model, stack).arch.keep
            blocks.append(_plan_block(stack.component, path, block, groups, keep, policy, config))
    inside = tuple(block.path + "." for block in blocks)
    wanted = head_name(model) if config.lm_head else ""
    outside = tuple(
        _outside(name, module, config, wanted)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (name + ".").startswith(inside)
    )
    head = plan_head(model, outside, [block.path for block in blocks], config)
    before = sum(parameter.numel() for parameter in model.parameters()) * itemsize
    saved = sum(saved_bytes(linear, itemsize) for block in blocks for linear in block.quantized)
    if head is not None:
        saved += saved_bytes(head.linear, 0 if head.tied else itemsize)  # a tied head is stored beside its embedding
    return Plan(
        model_type=getattr(model.config, "model_type", ""),
        family=owner.arch.family,
        plugin=owner.plugin,
        dist=owner.dist,
        version=owner.version,
        config=config,
        policies=tuple(policies.values()),
        blocks=tuple(blocks),
        outside=outside,
        bytes_before=before,
        bytes_after=before - saved,
        peak_bytes=_peak_bytes(blocks, head, config, calibration_tokens if config.needs_calibration else 0, itemsize),
        stacks=stacks,
        head=head,
        routers=tuple(name for name in matrices(model) if not isinstance(model.get_submodule(name), nn.Linear)),
    )


def stack_blocks(model: nn.Module, stack: LayerStack) -> list[tuple[str, nn.Module, int]]:
    """(path, module, index) of each block of a stack."""
    try:
        module = model.get_submodule(stack.blocks)
    except AttributeError as error:
        lists = [name for name, child in model.named_modules() if isinstance(child, nn.ModuleList)]
        raise PlanError(
            f"stack {stack.component!r}: the model has no module {stack.blocks!r}",
            hint=f"its lists of modules: {', '.join(lists[:8])}",
        ) from error
    if isinstance(module, nn.ModuleList):
        return [(f"{stack.blocks}.{index}", block, index) for index, block in enumerate(module)]
    return [(stack.blocks, module, 0)]


def groups_owner(manager: PluginManager, owner: Owner, model: nn.Module, stack: LayerStack) -> Owner:
    """The owner of a stack's scale groups: the text model's plugin where `groups_from` says so."""
    if stack.groups_from is None:
        return owner
    config = getattr(model.config, stack.groups_from, None)
    if config is None:
        raise PlanError(f"stack {stack.component!r}: the configuration has no {stack.groups_from!r}")
    return manager.owner(_TextClaim(config.model_type), None)


class _TextClaim:
    """A sub-config's claim: only its model type counts, since `architectures` names the whole model."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.architectures: list[str] = []


def manager_groups(
    manager: PluginManager, owner: Owner, model: nn.Module, stack: LayerStack, block: nn.Module, index: int
) -> Sequence[ScaleGroup]:
    """The declared scale groups of one block."""
    return manager.scale_groups(groups_owner(manager, owner, model, stack), stack, block, index)


def _policies(
    owner: Owner, manager: PluginManager, model: nn.Module, stacks: tuple[LayerStack, ...], config: QuantConfig
) -> dict[str, ComponentPolicy]:
    declared = {policy.component: policy for policy in manager.component_policies(owner, model.config)}
    names = dict.fromkeys(stack.component for stack in stacks)
    for component in config.components:
        if component not in names:
            raise ConfigError(f"the model has no component {component!r}", hint=f"it has: {', '.join(names)}")
    policies: dict[str, ComponentPolicy] = {}
    for name in names:
        choice = config.components.get(name)
        if choice is None:
            policies[name] = declared.get(name) or ComponentPolicy(
                component=name, action="keep", reason="no policy declared"
            )
            _require_one_format(policies[name], owner, config)
        else:
            action = "keep" if choice == "keep" else "quantize"
            policies[name] = ComponentPolicy(component=name, action=action, reason="asked for")  # type: ignore[arg-type]
    return policies


def _require_one_format(policy: ComponentPolicy, owner: Owner, config: QuantConfig) -> None:
    """An AWQ checkpoint says one width and one group size for all of its linears."""
    for name, wanted, given in (
        ("bits", policy.bits, config.bits),
        ("group_size", policy.group_size, config.group_size),
    ):
        if policy.action == "quantize" and wanted not in (None, given):
            raise PlanError(
                f"{owner.label} wants {name}={wanted} for component {policy.component!r}, the checkpoint has {given}",
                hint=f"--component {policy.component}=4bit or {policy.component}=keep",
            )


def _plan_block(
    component: str,
    path: str,
    block: nn.Module,
    declared: Sequence[ScaleGroup],
    keep: Sequence[str],
    policy: ComponentPolicy,
    config: QuantConfig,
) -> BlockPlan:
    parameters = sum(parameter.numel() for parameter in block.parameters())
    modules = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    if policy.action == "keep":
        reason = f"{component}: {policy.reason or 'kept by policy'}"
        kept = tuple(_linear(f"{path}.{name}" if name else path, module, reason) for name, module in modules.items())
        return BlockPlan(component, path, kept, parameters=parameters)
    groups, skipped = resolve_groups(block, declared, where=path)
    compensated = {name for group in declared for pattern in group.compensate for name in expand(pattern, modules)}
    read = {name for pattern in keep for name in expand(pattern, modules)}
    unclipped = {name for group in declared for pattern in group.no_clip for name in expand(pattern, modules)}
    group_size = policy.group_size or config.group_size
    full = {name: f"{path}.{name}" if name else path for name in modules}  # a block may be one linear
    reasons = {
        name: _asked(full[name], config)
        or ("reads a scaled tensor but is never quantized" if name in compensated else "")
        or ("the model reads its weight instead of calling it" if name in read else _shape_reason(m, group_size))
        for name, m in modules.items()
    }
    for together in (*(group.layers for group in groups), *(skip.layers for skip in skipped)):
        odd = next((name for name in together if reasons[name]), None)
        if odd is not None:
            for name in together:
                reasons[name] = reasons[name] or f"kept together with {odd}"
    linears = tuple(
        _linear(full[name], module, reasons[name], group_size, clip=name not in unclipped)
        for name, module in modules.items()
    )
    active = tuple(group for group in groups if not reasons[group.layers[0]])
    skipped += tuple(Skip(group.prev, "its readers are kept") for group in groups if reasons[group.layers[0]])
    mixtures = tuple(name for name, module in block.named_modules() if hasattr(module, "calibrating"))
    return BlockPlan(component, path, linears, active, skipped, parameters, mixtures)


def _outside(name: str, module: nn.Linear, config: QuantConfig, head: str) -> LinearPlan:
    """A linear outside every stack: kept, unless it is the output head and that is asked for."""
    if name != head:
        return _linear(name, module, "outside every stack: output heads and small projections stay as they are")
    return _linear(name, module, _asked(name, config) or _shape_reason(module, config.group_size), config.group_size)


def _asked(name: str, config: QuantConfig) -> str:
    pattern = next((p for p in config.modules_to_not_convert if p in name), "")
    return f"asked for: modules_to_not_convert has {pattern!r}" if pattern else ""


def _shape_reason(module: nn.Linear, group_size: int) -> str:
    if group_size != -1 and module.in_features % group_size:
        return f"group size {group_size} does not divide its {module.in_features} inputs"
    if module.out_features % 8:
        return f"{module.out_features} outputs are not a multiple of 8"
    return ""


def _linear(name: str, module: nn.Linear, reason: str, group_size: int = 0, *, clip: bool = True) -> LinearPlan:
    size = (module.in_features if group_size == -1 else group_size) if not reason else 0
    return LinearPlan(
        name, module.in_features, module.out_features, module.bias is not None, not reason, size, clip, reason
    )


def saved_bytes(linear: LinearPlan, itemsize: int) -> int:
    """Bytes by which quantization makes a linear smaller: codes, 16-bit scales and 4-bit zeros instead of weights of
    `itemsize` bytes."""
    groups = linear.in_features // linear.group_size
    packed = linear.in_features * linear.out_features // 2 + groups * linear.out_features * (2 + 0.5)
    return int(linear.in_features * linear.out_features * itemsize - packed)


def _peak_bytes(blocks: list[BlockPlan], head: HeadPlan | None, config: QuantConfig, tokens: int, itemsize: int) -> int:
    """Twice the largest block, the activations between blocks, the Gram matrices that exist at once and two more of the
    largest to compute with (four for gptq, which factorizes it), and a gigabyte.

    Correcting inputs takes the activations and the Gram matrices twice. The output head comes after the blocks, in
    chunks, and counts where it takes more than they do."""
    gptq = config.rounding == "gptq"
    last = working_bytes(head, itemsize, calibrated=tokens > 0, factorized=gptq) if head else 0
    worked = [block for block in blocks if block.quantized]
    if not worked:
        return (tokens * head.linear.in_features * itemsize if head else 0) + last + GIB
    block = max(block.parameters for block in worked) * itemsize
    if not tokens:
        return max(2 * block, last) + GIB
    hidden = worked[0].quantized[0].in_features
    largest = max(linear.in_features for block_ in worked for linear in block_.quantized) ** 2 * 4
    grams = max(gram_bytes(block_) for block_ in worked)
    working = (4 if gptq else 2) * largest
    versions = 2 if config.correct_inputs else 1
    return versions * tokens * hidden * itemsize + max(2 * block + versions * grams + working, last) + GIB
