"""The GPTQ layout: the codes of AWQ, packed along the inputs instead of the outputs.

    qweight int32 [in/8, out]        eight neighbouring inputs a word
    qzeros  int32 [groups, out/8]    eight neighbouring outputs a word; "gptq" stores z - 1, "gptq_v2" stores z
    scales        [groups, out]
    g_idx   int32 [in]               the group of each input, i // group: no act-order

A zero point of 0 has no agreed form in "gptq": as 15, which some readers take for 16, or with a borrow from the
neighbour, which others read as two wrong numbers. It is refused there. GPTQModel reads zero points that are not 8 from
"gptq_v2", and from "gptq" only if it wrote the folder itself.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from awq_core.checkpoint.pack import PER_WORD, PackedLinear, unpack
from awq_core.errors import CheckpointError
from awq_core.export.card import Card
from awq_core.export.neighbours import pack_columns, pack_rows
from awq_core.export.source import Source
from awq_core.export.writing import write_folder
from awq_core.version import __version__

V1 = "gptq"


def write(source: Source, out: Path, to: str = V1) -> None:
    """Write `source` in the layout `to`, "gptq" or "gptq_v2".

    Raises:
        CheckpointError: a zero point of 0 in "gptq"; input features that are no multiple of 8.
    """
    card = Card(
        title="GPTQ 4-bit",
        tags=("gptq", "4-bit", "int4"),
        format=f"the GPTQ layout `{to}`: 4-bit codes found by AWQ, zero points",
        use="```\nvllm serve NAME\n```"
        if to == V1
        else '```python\nfrom gptqmodel import GPTQModel\nmodel = GPTQModel.load("NAME")\n```',
    )
    write_folder(source, out, partial(tensors, version=to), section(source, to), card)


def section(source: Source, version: str) -> dict[str, Any]:
    """The `quantization_config` that transformers, GPTQModel, vLLM and SGLang read."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": source.settings.group_size,
        "desc_act": False,
        "sym": not source.settings.zero_point,
        "lm_head": source.lm_head,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in source.kept},  # linears to leave alone
        "meta": {"quantizer": [f"awq-core:{__version__}"]},
    }


def tensors(name: str, packed: PackedLinear, *, version: str) -> dict[str, torch.Tensor]:
    """The four tensors of a linear.

    Raises:
        CheckpointError: as `write`.
    """
    codes, zeros = unpack(packed.qweight), unpack(packed.qzeros)
    rows = len(codes)
    if rows % PER_WORD:
        raise CheckpointError(f"{name}: {rows} input features cannot be packed eight to a word", hint="export to awq")
    if version == V1 and bool((zeros == 0).any()):
        raise CheckpointError(
            f"{name}: a zero point of 0, which readers of 'gptq' disagree on", hint="--to gptq_v2 stores it plainly"
        )
    return {
        f"{name}.qweight": pack_rows(codes),
        f"{name}.qzeros": pack_columns(zeros - 1 if version == V1 else zeros),
        f"{name}.scales": packed.scales,
        f"{name}.g_idx": torch.arange(rows, dtype=torch.int32) // packed.group_size,
    }
