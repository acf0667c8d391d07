"""What a plugin imports: the marker, the typed values, and shared presets.

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets
"""

from pluggy import HookimplMarker

from awq_core.hooks import presets
from awq_core.hooks.types import (
    Architecture,
    ComponentPolicy,
    FusedBlock,
    KernelBackend,
    LayerStack,
    ScaleGroup,
)

hookimpl = HookimplMarker("awq")

__all__ = [
    "Architecture",
    "ComponentPolicy",
    "FusedBlock",
    "KernelBackend",
    "LayerStack",
    "ScaleGroup",
    "hookimpl",
    "presets",
]
