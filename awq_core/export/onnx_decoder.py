"""ONNX: the decoder as a graph with int4 products (`onnx_linear`) and its key-value cache as inputs and outputs.

    input_ids, attention_mask, position_ids, past_key_values.N.key, .value   ->   logits, present.N.key, .value

These are the names and shapes that Optimum and most ONNX runners know; `past` may be of length 0. The graph comes from
torch's own exporter, so any decoder goes through of which torch can trace one step with no choice made by values.
It computes in float32. What the checkpoint holds in 16 bits stays so in the file, with a Cast behind it.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from awq_core.errors import CheckpointError, ConfigError
from awq_core.export.card import Card
from awq_core.export.onnx_experts import branch_experts
from awq_core.export.onnx_linear import MatMulNBits, translations
from awq_core.export.source import Source
from awq_core.export.staging import put, require, staged
from awq_core.export.writing import small_files
from awq_core.runtime.load import load

FILE = "model.onnx"
OPSET = 18
SMALL = 256  # elements: constants of the graph, left as they are
CARD = Card(
    title="AWQ 4-bit, ONNX",
    tags=("onnx", "awq", "4-bit", "int4"),
    format="ONNX, 4-bit codes found by AWQ in `MatMulNBits`",
    use=f'```python\nimport onnxruntime\nsession = onnxruntime.InferenceSession("NAME/{FILE}")\n```',
)


def write(source: Source, out: Path, to: str = "onnx") -> None:
    """Write `source` as `model.onnx`, its weights beside it in `model.onnx.data`, with the tokenizer's files.

    Raises:
        CheckpointError: a model that is more than a decoder or does not export; groups that make no blocks.
        ConfigError: a package is missing, or torch is older than 2.8.
        OutputError: `out` is not empty, holds an unfinished run, or the disk cannot take it.
    """
    require("onnx", "onnx", "onnxscript")
    if not hasattr(torch.onnx, "ops"):
        raise ConfigError(f"--to onnx needs torch 2.8, this is {torch.__version__}", hint="pip install -U torch")
    with staged(out) as stage:
        model = _model(source)
        program = trace(model)
        compact(program.model)
        program.save(str(stage / FILE), external_data=True)
        put(stage, small_files(source, None, CARD))


class Step(nn.Module):
    """One step of a decoder, with the cache as plain tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past: list[torch.Tensor],
        position_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Logits `[batch, tokens, vocabulary]`, then keys and values `[batch, heads, past + tokens, width]` in turn."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        positions = {} if position_ids is None else {"position_ids": position_ids}
        result = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        return (result.logits, *_tensors(result.past_key_values))


def trace(model: PreTrainedModel) -> Any:
    """The `torch.onnx.ONNXProgram` of a decoder, with any batch, number of tokens and length of the past.

    Raises:
        CheckpointError: it keeps something else than keys and values, or torch cannot export it.
    """
    batch, tokens, length = 2, 3, 5  # all different, and none 1, which the exporter takes for a constant
    try:
        with torch.no_grad():
            cache = model(input_ids=torch.ones(batch, length, dtype=torch.long), use_cache=True).past_key_values
            past = _tensors(cache)
        inputs = {
            "input_ids": torch.ones(batch, tokens, dtype=torch.long),
            "attention_mask": torch.ones(batch, length + tokens, dtype=torch.long),
            "past": past,
        }
        shapes: dict[str, Any] = {
            "input_ids": {0: "batch", 1: "tokens"},
            "attention_mask": {0: "batch", 1: "total"},
            "past": [{0: "batch", 2: "past"}] * len(past),
        }
        if "position_ids" in inspect.signature(model.forward).parameters:
            inputs["position_ids"] = torch.arange(length, length + tokens).repeat(batch, 1)
            shapes["position_ids"] = {0: "batch", 1: "tokens"}
        kinds = [f"{layer}.{kind}" for layer in range(len(past) // 2) for kind in ("key", "value")]
        plain = [name for name in inputs if name != "past"]
        names = [*plain[:2], *(f"past_key_values.{kind}" for kind in kinds), *plain[2:]]
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                Step(model).eval(),
                kwargs=inputs,
                dynamo=True,
                input_names=names,
                output_names=["logits", *(f"present.{kind}" for kind in kinds)],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:  # whatever a model's own code, or the exporter's, comes up with
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        reason = " ".join(str(first).split())[:200]
        raise CheckpointError(
            f"{model.config.model_type} does not export to ONNX: {type(first).__name__}: {reason}",
            hint="--to scaled-fp16, or another format",
        ) from error
    return program


def compact(model: Any) -> None:
    """Store float32 weights of an `onnx_ir.Model` in 16 bits where that loses nothing, and drop the exporter's notes.

    ONNX Runtime computes each Cast once, when it opens the file.
    """
    import onnx_ir

    graph = model.graph
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph):  # those of branches too
        node.metadata_props.clear()
        node.doc_string = None
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != onnx_ir.DataType.FLOAT or tensor.size < SMALL:
            continue
        full = torch.from_numpy(tensor.numpy())
        for dtype in (torch.bfloat16, torch.float16):
            short = full.to(dtype)
            if torch.equal(short.float(), full):
                cast = onnx_ir.node("Cast", [value], {"to": int(onnx_ir.DataType.FLOAT)})
                made = cast.outputs[0]
                made.name, made.shape, made.type = f"{name}.float", value.shape, value.type
                onnx_ir.convenience.replace_all_uses_with(value, made)
                cast.replace_input_with(0, value)  # its own use was replaced with the others
                value.const_value = onnx_ir.tensor(short, name=name)
                value.type = onnx_ir.TensorType(value.const_value.dtype)
                graph.insert_before(graph[0], cast)
                break


def _model(source: Source) -> PreTrainedModel:
    """The model in float32, its quantized linears as `MatMulNBits`, its experts in branches."""
    model = load(source.folder, dtype="float32", plugin=source.plugin, trust_remote_code=source.code)
    if getattr(model.config, "is_encoder_decoder", False) or model.config.get_text_config() is not model.config:
        raise CheckpointError(
            f"{model.config.model_type} does not export to ONNX: it is more than a decoder",
            hint="--to compressed-tensors or scaled-fp16",
        )
    for name, path in source.linears.items():
        parent, _, leaf = path.rpartition(".")
        old = model.get_submodule(path)
        made = MatMulNBits(name, source.linear(name), getattr(old, "bias", None), torch.float32)
        setattr(model.get_submodule(parent), leaf, made)
    branch_experts(model)
    return model


def _tensors(cache: Any) -> list[torch.Tensor]:
    """Keys and values of each layer in turn."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of names of axes, and of packages that it would know more operators with."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
