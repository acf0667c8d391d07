"""Activation-aware 4-bit quantization (AWQ) for every architecture, through plugins.

    import awq_core

    awq_core.plan("model-dir")                      what would happen to every weight
    awq_core.quantize("model-dir", "out-dir")       calibrate, quantize, save
    model = awq_core.load("out-dir")                a transformers model with int4 linears

Names are imported on first use: `import awq_core` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from awq_core.version import __version__

_EXPORTS = {
    "AutoAWQForCausalLM": "awq_core.compat",
    "AwqError": "awq_core.errors",
    "Plan": "awq_core.plan_types",
    "QuantConfig": "awq_core.config",
    "QuantizeResult": "awq_core.api",
    "component_effects": "awq_core.components",
    "infer": "awq_core.inference",
    "load": "awq_core.api",
    "plan": "awq_core.api",
    "quantize": "awq_core.api",
}

__all__ = [
    "AutoAWQForCausalLM",
    "AwqError",
    "Plan",
    "QuantConfig",
    "QuantizeResult",
    "__version__",
    "component_effects",
    "infer",
    "load",
    "plan",
    "quantize",
]

if TYPE_CHECKING:
    from awq_core.api import QuantizeResult, load, plan, quantize
    from awq_core.compat import AutoAWQForCausalLM
    from awq_core.components import component_effects
    from awq_core.config import QuantConfig
    from awq_core.errors import AwqError
    from awq_core.inference import infer
    from awq_core.plan_types import Plan


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'awq_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
