"""Ordinary 16-bit weights with the values of the quantized ones, for tools that read no 4-bit format.

    W[o, i] = (q[o, i] - z[o, g]) · Δ[o, g]      in float32, rounded to the dtype of Δ: float16 or bfloat16

Scales and clips are in the codes and in the tensors beside them, so nothing else is to be done. Rounding to 16 bits
loses what int4 kernels, which multiply in float32, keep: about 0.05 % of a weight in float16, 0.4 % in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

import torch

from awq_core.checkpoint.pack import PackedLinear, dequantize
from awq_core.errors import CheckpointError, NumericsError
from awq_core.export.card import Card
from awq_core.export.source import Source
from awq_core.export.writing import write_folder
from awq_core.model_folder import load_config
from awq_core.skeleton import build_skeleton

CARD = Card(
    title="AWQ unpacked to 16 bits",
    tags=("awq",),
    format="ordinary 16-bit weights with the values of AWQ's 4-bit codes",
    use="```python\nfrom transformers import AutoModelForCausalLM\n"
    'model = AutoModelForCausalLM.from_pretrained("NAME")\n```',
)


def write(source: Source, out: Path, to: str = "scaled-fp16") -> None:
    """Write `source` as an unquantized model.

    Raises:
        CheckpointError: transformers would not know a linear by its name.
        NumericsError: a weight is too large for float16.
    """
    require_places(source)

    def tensors(name: str, packed: PackedLinear) -> dict[str, torch.Tensor]:
        weight = dequantize(packed, packed.scales.dtype)
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"{name} overflows {weight.dtype}", hint="quantize a model in bfloat16")
        return {f"{name}.weight": weight.t().contiguous() if name in source.sideways else weight}

    write_folder(source, out, tensors, None, CARD)


def require_places(source: Source) -> None:
    """Prove that transformers finds a place for every unpacked weight: a model whose own checkpoint holds its experts
    in stacks is quantized expert by expert, and has no rule to stack them again.

    Raises:
        CheckpointError: it does not.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    config = load_config(source.folder, trust_remote_code=source.code)
    model = build_skeleton(config, trust_remote_code=source.code)  # as transformers has it, experts in stacks
    state, rules = model.state_dict(), get_model_conversion_mapping(model)
    renamings, converters = ([r for r in rules if isinstance(r, kind)] for kind in (WeightRenaming, WeightConverter))
    for name in source.linears:
        weight = f"{name}.weight"
        target, _ = rename_source_key(weight, renamings, converters, model.base_model_prefix, state)
        if target not in state and weight not in state:
            raise CheckpointError(
                f"transformers has no place for {weight}: the model stores its experts in stacks",
                hint="export to another format, such as --to awq",
            )
