"""What the conformance kit asks of a quantized folder: the original's names, its kept tensors bit for bit, its config.

original   model.layers.0.mlp.up_proj.weight            quantized    ...up_proj.qweight, .qzeros, .scales
           model.layers.0.input_layernorm.weight                     the same name; divided by s, if it is a `prev`
           model.vision_tower...weight                               the same name and the same bits
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.stacks import unstacked
from awq_core.plan_types import Plan
from awq_core.skeleton import targets

PACKED = (".qweight", ".qzeros", ".scales")


def check_folder(plan: Plan, skeleton: Any, source: Path, out: Path) -> None:
    """Compare the quantized folder `out` with the original `source`.

    Args:
        skeleton: the model without weights, prepared by its plugin.

    Raises:
        AssertionError: what is wrong, and what to do about it.
    """
    with CheckpointReader(source) as stored, CheckpointReader(out) as after:
        before = unstacked(stored, skeleton)
        packed = {name.removesuffix("qweight") for name in after.names if name.endswith(".qweight")}
        logical = {name for name in after.names if not name.endswith(PACKED)} | {base + "weight" for base in packed}
        odd = sorted(logical ^ set(before.names))
        assert not odd, (
            f"names on disk differ from the original checkpoint's, first {odd[0]}; name the linears that "
            "awq_prepare_model makes as the checkpoint does"
        )
        wanted = sum(linear.quantize for linear in plan.linears)
        assert len(packed) == wanted, f"{len(packed)} linears were packed, the plan has {wanted}: run `awq plan`"
        may_change = set(changing(plan))
        for inside, name in targets(skeleton, before.names):
            if inside not in may_change and name.removesuffix("weight") not in packed:
                assert torch.equal(before.tensor(name), after.tensor(name)), (
                    f"{name} is kept but changed; does a ScaleGroup or awq_prepare_model reach into what is kept?"
                )
    _check_config(plan, json.loads((out / "config.json").read_text(encoding="utf-8")))
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}, f"{file.name} lacks the metadata that transformers asks for"


def changing(plan: Plan) -> Iterator[str]:
    """Parameters, by their names in the model, that quantization may change: what absorbs or compensates a scale, and
    the biases of quantized linears."""
    for block in plan.blocks:
        for group in block.groups:
            for module in (group.prev, *group.compensate):
                yield from (f"{block.path}.{module}.{leaf}" for leaf in ("weight", "bias"))
    for linear in plan.linears:
        if linear.quantize:
            yield from (f"{linear.name}.{leaf}" for leaf in ("weight", "bias"))


def _check_config(plan: Plan, config: dict[str, Any]) -> None:
    settings = config["quantization_config"]
    assert settings["quant_method"] == "awq" and settings["bits"] == 4 and settings["version"] == "gemm", (
        f"config.json says {settings}; engines know quant_method awq, 4 bits, version gemm"
    )
    listed = settings["modules_to_not_convert"]
    for linear in plan.linears:
        kept = any(f"{linear.name}.".startswith(f"{prefix}.") for prefix in listed)  # mlp.gate is not mlp.gate_proj
        assert kept != linear.quantize, (
            f"{linear.name} is {'quantized' if linear.quantize else 'kept'} and modules_to_not_convert says otherwise: "
            f"{', '.join(listed)}"
        )
