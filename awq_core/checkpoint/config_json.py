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
    text = "\n".join([*quantized, *stored])
    prefixes: dict[str, None] = {}
    for prefix in plan.kept_prefixes():
        below = (name for name in names if name.startswith(prefix + "."))
        # A router's other parameters may lie elsewhere on disk, its weight tells.
        name = f"{prefix}.weight" if f"{prefix}.weight" in names else next(below, None)
        if name is not None and names[name].endswith(tail := name[len(prefix) :]):
            on_disk = names[name].removesuffix(tail)
            if on_disk not in text:
                prefixes[on_disk] = None
        prefixes[prefix] = None
    return with_engine_names(prefixes, [*quantized, *stored])
