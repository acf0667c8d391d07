"""The `config.json` of a result: the original's, and what is quantized in it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from awq_core.checkpoint.engine_names import with_engine_names
from awq_core.checkpoint.format import quantization_config
from awq_core.output_head import untied
from awq_core.plan_types import Plan


def config_json(raw: dict[str, Any], typed: PretrainedConfig, plan: Plan, names: dict[str, str]) -> dict[str, Any]:
    """What the file says.

    Args:
        raw: the original's file; `typed` is what transformers makes of it.
        names: name in the model -> name on disk.
    """
    head = plan.head
    settings = quantization_config(
        group_size=plan.config.group_size, modules_to_not_convert=_kept(plan, names), lm_head=head is not None
    )
    return {**(untied(raw, typed) if head and head.tied else raw), "quantization_config": settings}


def _kept(plan: Plan, names: dict[str, str]) -> list[str]:
    """Prefixes as on disk (vLLM starts from those) and, where transformers renames them, as in memory too."""
    quantized = [linear.name for linear in plan.linears if linear.quantize]
    stored = [names.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight") for name in quantized]
    prefixes: dict[str, None] = {}
    for prefix in plan.kept_prefixes():
        for name, on_disk in names.items():
            if name.startswith(prefix + "."):
                tail = name[len(prefix) :]
                if on_disk.endswith(tail):
                    prefixes[on_disk.removesuffix(tail)] = None
                break
        prefixes[prefix] = None
    return with_engine_names(prefixes, [*quantized, *stored])
