"""What a wrong declaration costs: a plugin's tests pin its traps down with it.

assert proof_error(config, FALCON, [replace(norm, layers=norm.layers[:1]), values]) > 0.1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from awq_core.hooks import Architecture, ScaleGroup, hookimpl
from awq_core.hooks.manager import PluginManager
from awq_core.quantization.proof import prove


def proof_error(
    config: Any,
    arch: Architecture,
    groups: Sequence[ScaleGroup],
    *,
    prepare: Callable[[nn.Module], bool] | None = None,
) -> float:
    """How far random scales in `groups`, instead of those of `arch`, move the outputs of a tiny model of `config`.

    Args:
        prepare: what `awq_prepare_model` does, where the family has that hook.
    """
    changed = replace(arch, scale_groups=tuple(groups))

    class Plugin:
        @hookimpl
        def awq_architectures(self) -> Sequence[Architecture]:
            return (changed,)

        @hookimpl
        def awq_prepare_model(self, arch: Architecture, model: nn.Module) -> bool | None:
            return prepare(model) if prepare else None

    manager = PluginManager(allow=())
    manager.register(Plugin(), arch.family)
    return prove(config, manager.owner(config), manager).error
