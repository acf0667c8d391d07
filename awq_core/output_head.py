"""The output head: which linear it is, whether the format can hold it, and how many of its rows are worked at once.

The head is the linear that turns the last hidden states into one score a word of the vocabulary, `[vocabulary,
hidden]`. It belongs to no block, is kept unless `QuantConfig.lm_head` asks for it, and is often the largest linear of
the model: 150 000 x 8192 take 4.9 GB in fp32. So it is worked some rows at a time, and rows are independent.

In many models the head shares its weight with the embedding table. An embedding is looked up, not multiplied, and stays
in 16 bits; quantizing the head *unties* the two: the checkpoint holds both, and `config.json` says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from awq_core.config import QuantConfig
from awq_core.errors import ConfigError
from awq_core.plan_types import HeadPlan, LinearPlan
from awq_core.skeleton import empty_twin

TIE = "tie_word_embeddings"
ONE_CHUNK = 1 << 25  # weights of the default chunk: 128 MB in fp32
# What `quantization.codes` works at once. Chunks are whole multiples, so their number changes no byte.
WORKED_AT_ONCE = 1 << 22
WORD = 8  # rows that share an int32


def head_name(model: Any) -> str:
    """Path of the linear that `model.get_output_embeddings()` returns; empty where there is none."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head and isinstance(head, nn.Linear)), "")


def plan_head(model: Any, linears: Iterable[LinearPlan], blocks: Iterable[str], config: QuantConfig) -> HeadPlan | None:
    """The head's place in the plan; None where it is not asked for.

    Args:
        linears: the model's linears outside every stack, as planned.
        blocks: paths of the blocks.

    Raises:
        ConfigError: it is asked for and cannot be quantized; says why.
    """
    if not config.lm_head:
        return None
    name = head_name(model)
    if not name:
        raise ConfigError(f"{type(model).__name__} has no linear output head to quantize", hint="leave out --lm-head")
    if any((name + ".").startswith(path + ".") for path in blocks):
        raise ConfigError(
            f"the output head {name} is a component of its own here", hint="quantize it with --component, not --lm-head"
        )
    linear = next(one for one in linears if one.name == name)
    if not linear.quantize:
        raise ConfigError(
            f"the output head {name} cannot be quantized: {linear.reason}",
            hint="leave out --lm-head, or what keeps it; --group-size 32 divides most widths",
        )
    tied = _shared(model, name)
    if tied and _shared(_untied_twin(model), name):
        raise ConfigError(
            f"the output head {name} is the embedding table, and {type(model).__name__} cannot have them apart",
            hint="leave out --lm-head",
        )
    rows = chunk_rows(linear.out_features, linear.in_features, config.lm_head_chunks)
    return HeadPlan(linear, tied, rows)


def chunk_rows(out_features: int, in_features: int, chunks: int = 0) -> int:
    """Rows of one chunk, for about `chunks` of them; 0 makes chunks of `ONE_CHUNK` weights.

    Rounded up to whole words, and to the rows that are worked at once: so the same products are computed whatever the
    number of chunks, and the same bytes are written. A small head is one chunk, however many are asked for.
    """
    wanted = -(-out_features // chunks) if chunks else ONE_CHUNK // in_features
    unit = math.lcm(WORD, max(1, WORKED_AT_ONCE // in_features))
    return min(out_features, max(1, -(-wanted // unit)) * unit)


def working_bytes(head: HeadPlan, itemsize: int, *, calibrated: bool, factorized: bool) -> int:
    """Peak memory of working the head: a chunk as stored, in fp32 and as codes, the packed head, and the Gram matrix
    with two more to compute with (four for a rounding that factorizes it)."""
    linear = head.linear
    chunk = head.rows * linear.in_features * (itemsize + 4 + 1)
    packed = linear.in_features * linear.out_features // 2
    grams = (5 if factorized else 3) * linear.in_features**2 * 4 if calibrated else 0
    return chunk + packed + grams


def untied(raw: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A config.json whose head and embedding table are two tensors.

    Args:
        raw: the original's, as it is written.
        config: the original's, typed: defaults that tie count as well.
    """
    result = {**raw, TIE: False}
    for name in getattr(config, "sub_configs", None) or ():
        part, written = getattr(config, name, None), raw.get(name)
        if getattr(part, TIE, False) or (isinstance(written, Mapping) and TIE in written):
            result[name] = untied(written if isinstance(written, Mapping) else {}, part)
    return result


def _shared(model: Any, head: str) -> str:
    """Name of another parameter that is the head's weight; empty where it has one of its own."""
    weight = model.get_submodule(head).weight
    names = model.named_parameters(remove_duplicate=False)
    return next((name for name, parameter in names if parameter is weight and name != f"{head}.weight"), "")


def _untied_twin(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())):
        if hasattr(part, TIE):
            setattr(part, TIE, False)
    return empty_twin(model, config)
