"""AWQ "gemm": a copy, or another toolkit's folder in this project's own format (`checkpoint.pack`)."""

from __future__ import annotations

from pathlib import Path

import torch

from awq_core.checkpoint.engine_names import with_engine_names
from awq_core.checkpoint.format import quantization_config
from awq_core.checkpoint.pack import PackedLinear
from awq_core.export.card import Card
from awq_core.export.source import Source
from awq_core.export.writing import write_folder
from awq_core.plan_types import prefixes

CARD = Card(
    title="AWQ 4-bit",
    tags=("awq", "4-bit", "int4"),
    format='AWQ "gemm": 4-bit codes, zero points',
    use='```python\nimport awq_core\nmodel = awq_core.load("NAME")\n```\n\n```\nvllm serve NAME\n```',
)


def write(source: Source, out: Path, to: str = "awq") -> None:
    """Write `source` as AWQ gemm."""
    quantized = {*source.linears, *source.linears.values()}
    section = quantization_config(
        group_size=source.settings.group_size,
        modules_to_not_convert=with_engine_names(prefixes(source.kept, quantized), quantized),
        lm_head=source.lm_head,
    )
    write_folder(source, out, tensors, section, CARD)


def tensors(name: str, packed: PackedLinear) -> dict[str, torch.Tensor]:
    """qweight [in, out/8], qzeros [in/group, out/8], scales [in/group, out]."""
    return {f"{name}.qweight": packed.qweight, f"{name}.qzeros": packed.qzeros, f"{name}.scales": packed.scales}
