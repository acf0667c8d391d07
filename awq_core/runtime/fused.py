"""`load(fuse=True)`: the replacements that the model's plugin declares, in every block of the language model.

A linear's weights can be merged while they are as in the checkpoint, not once a kernel has laid them out. So the loader
leaves a `PackedWeights` in place of each quantized linear, and block by block

    PackedWeights of the parts  ──concatenated along the outputs──>  one QuantLinear  ──factory──>  the fused module
    PackedWeights that are left ──────────────────────────────────>  QuantLinear

What cannot be fused stays as it is, and one line says why. The model computes what it computed before. Like every
model with int4 linears it is for running: its `save_pretrained` is refused, so nothing fused reaches a checkpoint.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from awq_core import kernels
from awq_core.checkpoint.pack import PackedLinear
from awq_core.errors import PluginError, UnsupportedModelError
from awq_core.hooks.manager import Owner, PluginManager
from awq_core.hooks.types import FusedBlock, KernelBackend, LayerStack
from awq_core.modules import NotFusedError, UnstackedExperts
from awq_core.planning import groups_owner, stack_blocks
from awq_core.runtime.linear import QuantLinear
from awq_core.scale_groups import expand

LANGUAGE = "language"
TENSORS = ("qweight", "qzeros", "scales")


class PackedWeights(nn.Module):
    """A quantized linear that is read and not yet laid out for a kernel; it has no `forward`."""

    def __init__(self, packed: PackedLinear, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight_dtype = dtype
        self.out_features = packed.scales.shape[1]
        for name in TENSORS:
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias, persistent=False)

    @property
    def packed(self) -> PackedLinear:
        """The weights, as in the checkpoint."""
        return PackedLinear(*(getattr(self, name) for name in TENSORS))

    def linear(self, backends: Sequence[KernelBackend]) -> QuantLinear:
        """The linear itself."""
        return QuantLinear(self.packed, self.bias, self.weight_dtype, backends=backends)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one declared replacement in one block; `why` is empty where it was made."""

    name: str
    why: str = ""


def fuse_blocks(model: PreTrainedModel, owner: Owner | None, manager: PluginManager) -> str:
    """Fuse what can be, turn every `PackedWeights` into a linear, and say in one line what was done.

    Raises:
        PluginError: a factory does not exist, failed, or returned no module.
    """
    example = next((module for module in model.modules() if isinstance(module, PackedWeights)), None)
    outcomes: list[Outcome] = []
    line = ""
    if owner is None:
        line = "not fused: no plugin claims the model"
    elif example is None:
        line = "not fused: nothing is quantized"
    else:
        try:
            outcomes = _fuse_stacks(model, owner, manager, example)
        except UnsupportedModelError as error:
            line = f"not fused: {error}"
    finish(model, manager.kernel_backends())
    return line or summary(outcomes)


def declarations(
    model: PreTrainedModel, owner: Owner, manager: PluginManager, backend: str
) -> list[tuple[LayerStack, tuple[FusedBlock, ...]]]:
    """What may be fused in each stack of the language model, by the plugin that owns the stack's scale groups.

    Raises:
        UnsupportedModelError: that plugin, the text model's, is not installed.
    """
    return [
        (stack, manager.fused_blocks(groups_owner(manager, owner, model, stack), model, backend))
        for stack in manager.layer_stacks(owner, model)
        if stack.component == LANGUAGE
    ]


def finish(model: nn.Module, backends: Sequence[KernelBackend]) -> None:
    """Turn every `PackedWeights` below `model` into a linear."""
    # By path: a list of the modules would keep every linear's packed tensors until the last one is laid out.
    for path in [path for path, module in model.named_modules() if isinstance(module, PackedWeights)]:
        waiting: Any = model.get_submodule(path)
        model.set_submodule(path, waiting.linear(backends))


def summary(outcomes: Sequence[Outcome]) -> str:
    """ "fused qkv, gate-up in 32 of 32 blocks; not fused: norms (no GPU)"."""
    names = list(dict.fromkeys(outcome.name for outcome in outcomes))
    counts: dict[tuple[int, int], list[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for name in names:
        mine = [outcome for outcome in outcomes if outcome.name == name]
        made = sum(not outcome.why for outcome in mine)
        if made:
            counts.setdefault((made, len(mine)), []).append(name)
        for why in dict.fromkeys(outcome.why for outcome in mine if outcome.why):
            blocks = sum(outcome.why == why for outcome in mine)
            where = "" if blocks == len(mine) else f" in {blocks} of {len(mine)}"
            reasons.setdefault((where, why), []).append(name)
    done = ", ".join(f"{', '.join(which)} in {made} of {total} blocks" for (made, total), which in counts.items())
    left = ", ".join(f"{', '.join(which)}{where} ({why})" for (where, why), which in reasons.items())
    parts = [f"fused {done}" if done else "", f"not fused: {left}" if left else ""]
    return "; ".join(part for part in parts if part) or "not fused: the plugin declares no fused blocks"


def _fuse_stacks(model: PreTrainedModel, owner: Owner, manager: PluginManager, example: PackedWeights) -> list[Outcome]:
    backends = manager.kernel_backends()
    device = example.packed.qweight.device
    backend = kernels.choose(example.packed, example.weight_dtype, device=device.type, backends=backends).name
    outcomes: list[Outcome] = []
    for stack, declared in declarations(model, owner, manager, backend):
        for path, block, _ in stack_blocks(model, stack):
            for one in declared:
                outcomes += _fuse(model, path, block, one, backends, owner)
            finish(block, backends)
    return outcomes


def _fuse(
    model: nn.Module,
    path: str,
    block: nn.Module,
    declared: FusedBlock,
    backends: Sequence[KernelBackend],
    owner: Owner,
) -> list[Outcome]:
    """One declaration in one block: as many outcomes as modules match."""
    name = declared.name or declared.match
    matches = expand(declared.match, dict(block.named_modules()))
    outcomes = [] if matches else [Outcome(name, f"no {declared.match}")]
    for match in matches:
        module = block.get_submodule(match)
        try:
            made = _replacement(module, declared, backends)
        except NotFusedError as why:
            outcomes.append(Outcome(name, str(why)))
            continue
        except Exception as error:
            raise PluginError(
                f"{owner.label}: {declared.factory} raised {type(error).__name__}: {error}", hint="load without fuse"
            ) from error
        if not isinstance(made, nn.Module):
            raise PluginError(f"{owner.label}: {declared.factory} returned a {type(made).__name__}, not a module")
        if made is not module:
            model.set_submodule(f"{path}.{match}" if match else path, made)
        outcomes.append(Outcome(name))
    return outcomes


def _replacement(module: nn.Module, declared: FusedBlock, backends: Sequence[KernelBackend]) -> Any:
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if why := unfit(declared.min_capability, device):
        raise NotFusedError(why)
    sizes: dict[str, int] = {}
    parts: list[PackedWeights] = []
    for path in declared.parts:
        try:
            part = module.get_submodule(path)
        except AttributeError:
            raise NotFusedError(f"no {path}") from None
        if not isinstance(part, PackedWeights):
            raise NotFusedError(f"{path} is not in 4 bits")
        sizes[path] = part.out_features
        parts.append(part)
    merged = merge(parts, declared.parts).linear(backends) if parts else None
    return _factory(declared.factory)(module, merged, sizes)


def merge(parts: Sequence[PackedWeights], names: Sequence[str]) -> PackedWeights:
    """Linears of one input as one, outputs side by side; those without a bias get zeros where others have one.

    Raises:
        NotFusedError: their inputs, groups or dtypes differ.
    """
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        for what, mine, other in (
            ("inputs", part.packed.qweight.shape[0], first.packed.qweight.shape[0]),
            ("group size", part.packed.group_size, first.packed.group_size),
            ("scales", part.packed.scales.dtype, first.packed.scales.dtype),
            ("device", part.packed.qweight.device, first.packed.qweight.device),
        ):
            if mine != other:
                raise NotFusedError(f"{what} of {name}: {mine}, of {names[0]}: {other}")
    packed = PackedLinear(*(torch.cat([getattr(part.packed, name) for part in parts], dim=1) for name in TENSORS))
    bias = None
    if any(part.bias is not None for part in parts):
        scales = first.packed.scales
        zeros = [scales.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
        bias = torch.cat([one.to(first.weight_dtype) for one in zeros])
    return PackedWeights(packed, bias, first.weight_dtype)


def unfit(needed: int, device: torch.device) -> str:
    """Why a replacement for GPUs cannot be made on this device; empty when it can."""
    if not needed:
        return ""
    if device.type != "cuda":
        return "no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    have = 10 * major + minor
    return "" if have >= needed else f"needs compute capability {needed}, this GPU has {have}"


def _factory(text: str) -> Callable[..., Any]:
    module, _, attribute = text.partition(":")
    factory: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return factory


def prefer_graphs(model: PreTrainedModel) -> None:
    """On a GPU `generate` uses a pre-allocated cache, for which transformers compiles the decode step and captures it
    as a CUDA graph; the prompt is not compiled. Experts that run one by one cannot be captured."""
    experts = any(isinstance(module, UnstackedExperts) and not module.together for module in model.modules())
    if model.device.type == "cuda" and getattr(model, "_can_compile_fullgraph", False) and not experts:
        model.generation_config.cache_implementation = "static"


def report(line: str) -> None:
    """The one line, on stderr."""
    print(line, file=sys.stderr)
