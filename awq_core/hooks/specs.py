"""The eight hooks. This file is their index; `docs/plugins/hooks.md` has an example of each.

A text architecture implements one: `awq_architectures`. Rules for implementations: parameters are passed by name and
a hook may take fewer than listed here; no defaults, no keyword-only parameters, no `specname`, no wrappers, no
`trylast` (pluggy versions treat them differently, so the manager refuses them). Hooks that "the owner, then defaults"
answer are never asked of another family's plugin, so an implementation need not test whether the model is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pluggy import HookspecMarker

from awq_core.hooks.types import Architecture, ComponentPolicy, FusedBlock, KernelBackend, LayerStack, ScaleGroup

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

hookspec = HookspecMarker("awq")


@hookspec
def awq_architectures() -> Sequence[Architecture]:  # type: ignore[empty-body]
    """The architectures this plugin brings: claims, stacks, scale groups. Asked of all plugins, once; results are
    collected. Pure data: no I/O, no torch."""


@hookspec
def awq_kernel_backends() -> Sequence[KernelBackend]:  # type: ignore[empty-body]
    """Implementations of the int4 linear. Asked of all plugins, once; results are collected."""


@hookspec(firstresult=True)
def awq_layer_stacks(arch: Architecture, model: torch.nn.Module) -> Sequence[LayerStack] | None:
    """Where the blocks of `model` are, when that depends on the built model (its weights may be on the meta device).
    Owner, then defaults (`arch.stacks`); first result."""


@hookspec(firstresult=True)
def awq_scale_groups(
    arch: Architecture, stack: LayerStack, block: torch.nn.Module, index: int
) -> Sequence[ScaleGroup] | None:
    """The scale groups of one block, when they differ from block to block (hybrid stacks). May look at the block's
    structure, must not change it. Owner, then defaults (`arch.scale_groups` for "language", none elsewhere)."""


@hookspec(firstresult=True)
def awq_component_policies(arch: Architecture, config: PretrainedConfig) -> Sequence[ComponentPolicy] | None:
    """Which components are quantized by default. Owner, then defaults (`arch.components`, else quantize "language"
    and keep the rest)."""


@hookspec(firstresult=True)
def awq_fused_blocks(arch: Architecture, model: torch.nn.Module, backend: str) -> Sequence[FusedBlock] | None:
    """Replacements in the language blocks of a model loaded with `fuse=True` that runs on kernel `backend`; never
    stored. Owner (of the text model, where a stack has `groups_from`), then defaults (`arch.fused`)."""


@hookspec(firstresult=True)
def awq_calibration_batch(arch: Architecture, processor: Any, sample: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Model inputs from one calibration sample. `sample` has "text" (str) or "messages" (list), and "images" (list of
    PIL images, may be empty); `processor` is the model's own. Owner, then defaults."""


@hookspec(firstresult=True)
def awq_prepare_model(arch: Architecture, model: torch.nn.Module) -> bool | None:
    """Turn weights that are no `nn.Linear` (stacked experts, Conv1D) into linears under their on-disk names, in place.
    Runs on the meta device, before any weight is read. Return True when something changed. Owner only."""
