"""`infer(config)`: the `Architecture` of a model that no plugin claims, with its proof and what is left out.

One block of each kind is searched (readers.py); kinds differ in the names and shapes of their parameters. A group that
some kinds lack is optional. Then all groups are folded into all blocks at once, as for a plugin, and one that does not
hold everywhere is dropped.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from awq_core.config import QuantConfig
from awq_core.errors import AwqError, UnsupportedModelError
from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl
from awq_core.hooks.loading import CORE, INFERRED
from awq_core.hooks.manager import Owner, PluginManager
from awq_core.inference.paths import pattern, patterns
from awq_core.inference.readers import NOT_CALLED, Group, Refused, Search, unreached
from awq_core.inference.stack import decoder_blocks
from awq_core.inference.tiny import WRITE, batches, real_model, small_outputs, tiny_model
from awq_core.inference.trial import Trial
from awq_core.model_folder import load_config, resolve
from awq_core.modules.unclaimed import Prepared, prepare_unclaimed
from awq_core.planning import make_plan
from awq_core.quantization.proof import Proof, logits_of, prove_model, resolved
from awq_core.scale_groups import GroupPlan, expand
from awq_core.version import __version__

CONTROL_MINIMUM = 1e-2  # the negative control must move the outputs by this much


@dataclass(frozen=True, slots=True)
class Unscaled:
    """A linear in no scale group, by its path in the block (a glob where experts share it), and why."""

    linear: str
    why: str


@dataclass(frozen=True)
class InferredArchitecture:
    """What inference found.

    Attributes:
        arch: the proposal, as a plugin would declare it.
        proof: all groups in all blocks of the tiny model.
        control: how far the outputs move if the readers alone are scaled.
        coverage: share of the blocks' parameters that would become 4-bit, if every group size divided every width.
        unscaled: linears that are quantized without a scale, and why. They are
            `arch.exempt`, or `arch.keep` where they were never called.
        prepared: what had to be replaced by linears first.
        unreached: parameters of two or more axes that are in no linear, with their shapes: they stay as they are.
        tiny: the configuration of the model that was searched.
    """

    arch: Architecture
    proof: Proof
    control: float
    coverage: float
    unscaled: tuple[Unscaled, ...]
    prepared: Prepared
    unreached: tuple[str, ...]
    tiny: Any

    @property
    def why_not(self) -> str:
        """Why it must not be used; empty when it is proved."""
        if not self.arch.scale_groups:
            reason = f": {self.unscaled[0].linear}: {self.unscaled[0].why}" if self.unscaled else ""
            return f"no scale group can be proved{reason or self._no_linears}"
        if not self.proof.proved:
            return f"the proposed groups move the outputs by {self.proof.error:.2g}"
        if not self.control >= CONTROL_MINIMUM:
            return f"the negative control moves the outputs by only {self.control:.2g}, so the proof means nothing"
        return ""

    @property
    def _no_linears(self) -> str:
        return f": its blocks have no linears, only {self.unreached[0]}" if self.unreached else ""

    @property
    def proved(self) -> bool:
        """Function preserved under random scales, and the negative control moved."""
        return not self.why_not

    def plugin(self) -> types.ModuleType:
        """The same as a plugin module, with its hooks."""
        module = types.ModuleType(INFERRED)
        arch = self.arch
        module.awq_architectures = hookimpl(lambda: (arch,))  # type: ignore[attr-defined]
        if self.prepared:
            module.awq_prepare_model = hookimpl(lambda model: bool(prepare_unclaimed(model)))  # type: ignore[attr-defined]
        return module

    def manager(self) -> PluginManager:
        """A manager that knows this architecture only."""
        return _manager(self.plugin())


def infer(
    config: Any, *, family: str = INFERRED, trust_remote_code: bool = False, seed: int = 0
) -> InferredArchitecture:
    """Trace a tiny random model of the class of `config` and propose an `Architecture` for it.

    Args:
        config: any transformers configuration, which is not changed, or a model folder or hub name.
        family: name of the proposal.

    Raises:
        UnsupportedModelError: no small model can be built or run, or it has no list of decoder blocks.
    """
    if isinstance(config, (str, os.PathLike)):
        config = load_config(resolve(config, weights=False), trust_remote_code=trust_remote_code)
    tiny, model, prepared = tiny_model(config, trust_remote_code, seed)
    blocks_path = decoder_blocks(model, lambda m: logits_of(m, next(batches(m))))
    if not blocks_path:
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: no list of decoder blocks is called in order by a pass over text",
            hint=WRITE,
        )
    real = real_model(config, prepared, trust_remote_code)
    blocks: Any = model.get_submodule(blocks_path)
    kinds = _kinds(blocks)
    found: list[tuple[nn.Module, list[Group], list[Refused], dict[str, str]]] = []
    for index in kinds:
        trial = Trial(model, blocks[index], [next(batches(model))])
        groups, refused = Search(trial, small_outputs(blocks[index], real, f"{blocks_path}.{index}"), seed).found()
        reasons = {name: unreached(trial.base, name) for name in trial.modules}
        found.append((blocks[index], groups, refused, reasons))
    arch = Architecture(
        family=family,
        model_types=(config.model_type,),
        stacks=(LayerStack(component="language", blocks=blocks_path),),
        scale_groups=_declared(found),
    )
    arch, dropped = _hold_everywhere(arch, model, seed)
    unscaled = tuple(_unscaled(arch, found, dropped))
    arch = replace(
        arch,
        exempt=tuple(one.linear for one in unscaled if one.why != NOT_CALLED),
        keep=tuple(one.linear for one in unscaled if one.why == NOT_CALLED),
    )
    owner, manager = _owner(arch)
    proof, control = (_proved(model, owner, manager, seed, fold) for fold in (True, False))
    return InferredArchitecture(
        arch=arch,
        proof=proof,
        control=control.error,
        coverage=_coverage(real, model, owner, manager),
        unscaled=unscaled,
        prepared=prepared,
        unreached=tuple(_unreached(blocks)),
        tiny=tiny,
    )


def _coverage(real: Any, model: nn.Module, owner: Owner, manager: PluginManager) -> float:
    config = QuantConfig(group_size=-1)
    try:
        return make_plan(real or model, owner, manager, config).coverage
    except AwqError:  # blocks that the small model has none of
        return make_plan(model, owner, manager, config).coverage


def _kinds(blocks: Any) -> list[int]:
    """Index of the first block of each kind."""
    seen: dict[Any, int] = {}
    for index, block in enumerate(blocks):
        seen.setdefault(tuple((name, tuple(p.shape)) for name, p in block.named_parameters()), index)
    return list(seen.values())


def _declared(found: list[Any]) -> tuple[ScaleGroup, ...]:
    """The groups of every kind as a plugin would write them: globs, each once, optional where a kind lacks them."""
    declared: dict[ScaleGroup, int] = {}
    for block, groups, _, _ in found:
        for group in groups:
            layers = patterns(group.layers, block)
            one = ScaleGroup(
                prev=pattern(group.prev, block),
                layers=layers,
                compensate=patterns(group.compensate, block),
                no_clip=patterns(group.no_clip, block),
                norm_offset=group.norm_offset,
                prev_rows=group.prev_rows,
                head_dim=group.head_dim,
                degree=group.degree,
            )
            declared[one] = declared.get(one, 0) + 1
    return tuple(group if count == len(found) else replace(group, optional=True) for group, count in declared.items())


def _hold_everywhere(arch: Architecture, model: nn.Module, seed: int) -> tuple[Architecture, dict[str, str]]:
    """The architecture without the groups that hold in the block they were found in and not in all: readers -> why."""
    dropped: dict[str, str] = {}
    while arch.scale_groups:
        owner, manager = _owner(arch)
        try:
            proof = _proved(model, owner, manager, seed, True)
            if proof.proved:
                break
            every = list(resolved(model, owner, manager))
            wrong = (i for i in range(proof.groups) if not _proved(model, owner, manager, seed, True, i).proved)
            block, plan = every[next(wrong, -1)]
            bad = next(one for one in arch.scale_groups if _matches(one, plan))
            path = next(name for name, module in model.named_modules() if module is block)
            why = f"scaling {bad.prev} changes the function in {path}"
        except AwqError as error:
            bad, why = arch.scale_groups[-1], error.message
        dropped |= dict.fromkeys(bad.layers, why)
        arch = replace(arch, scale_groups=tuple(one for one in arch.scale_groups if one is not bad))
    return arch, dropped


def _matches(group: ScaleGroup, plan: GroupPlan) -> bool:
    return bool(expand(group.prev, {plan.prev: None})) and any(expand(one, {plan.layers[0]: 0}) for one in group.layers)


def _proved(
    model: nn.Module, owner: Owner, manager: PluginManager, seed: int, fold: bool, only: int | None = None
) -> Proof:
    """The plugins' proof on this model, whose weights are the same afterwards."""
    saved = [(parameter, parameter.data.clone()) for parameter in model.parameters()]
    try:
        return prove_model(model, owner, manager, fold_previous=fold, only=only, seed=seed)
    finally:
        for parameter, values in saved:
            parameter.data.copy_(values)


def _unscaled(arch: Architecture, found: list[Any], dropped: dict[str, str]) -> Iterator[Unscaled]:
    """Every linear in no group, once, with the best reason there is."""
    grouped = {path for group in arch.scale_groups for path in (*group.layers, *group.compensate)}
    told: set[str] = set()
    for block, _, refused, reasons in found:
        whys = {name: one.why for one in refused for name in one.layers}
        for name, module in block.named_modules():
            path = pattern(name, block)
            if isinstance(module, nn.Linear) and path not in grouped and path not in told:
                told.add(path)
                yield Unscaled(path, dropped.get(path) or whys.get(name) or reasons[name])


def _unreached(blocks: Any) -> Iterator[str]:
    """Parameters of two or more axes that belong to no linear: each kind once, with its shape."""
    told: set[str] = set()
    for block in blocks:
        for name, module in block.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                path = f"{name}.{leaf}" if name else leaf
                if parameter.ndim >= 2 and not isinstance(module, nn.Linear) and path not in told:
                    told.add(path)
                    yield f"{path} {list(parameter.shape)} of {type(module).__name__}"


def _owner(arch: Architecture) -> tuple[Owner, PluginManager]:
    module = types.ModuleType(INFERRED)
    module.awq_architectures = hookimpl(lambda: (arch,))  # type: ignore[attr-defined]
    manager = _manager(module)
    return manager.architectures[0], manager


def _manager(plugin: types.ModuleType) -> PluginManager:
    manager = PluginManager(allow=())
    manager.register(plugin, INFERRED, CORE, __version__)
    return manager
