"""The table of formats, and the calls that write them.

A format is a module of this package with one function,

    write(source: Source, out: Path, to: str) -> None     the whole folder, which appears at once or not at all
    notes(source: Source) -> tuple[str, ...]              optional: lines about who can read this one

and a line in `FORMATS`. The modules are imported when they are used: listing the formats imports no torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from awq_core.errors import ConfigError, OutputError

# name -> (module, what it is for)
FORMATS: dict[str, tuple[str, str]] = {
    "awq": ("awq_core.export.awq", "AWQ gemm: this project, vLLM, SGLang"),
    "gptq": ("awq_core.export.gptq", "the GPTQ layout, zero points stored less one: vLLM, SGLang, ExLlamaV2"),
    "gptq_v2": ("awq_core.export.gptq", "the GPTQ layout, zero points as they are: GPTQModel, recent vLLM"),
    "compressed-tensors": ("awq_core.export.compressed_tensors", "pack-quantized: transformers, vLLM, SGLang"),
    "torch": ("awq_core.export.torch_state", "the AWQ tensors in a state dict, model.pt: a pickle"),
    "scaled-fp16": ("awq_core.export.unpacked", "ordinary 16-bit weights with the same values: any tool"),
    "onnx": ("awq_core.export.onnx_decoder", "a graph with int4 MatMulNBits and a key-value cache: ONNX Runtime"),
    "gguf": ("awq_core.export.gguf_file", "one file with its tokenizer, 4-bit as Q4_1: llama.cpp"),
    "gguf-fp16": ("awq_core.export.gguf_file", "the same in float16, for llama.cpp's own quantizer"),
}

EIGHT_BIT = "compressed-tensors"  # the format that holds linears of 8 bits beside those of 4


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        linears: how many linears are quantized to 4 bits.
        nbytes: size of all files of `out`.
        eight_bit: names of the kept linears that are in 8 bits.
        notes: lines about who can read it.
    """

    out: Path
    format: str
    linears: int
    nbytes: int
    eight_bit: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "awq",
    *,
    eight_bit: Sequence[str] = (),
    plugin: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a quantized folder again, in another format.

    Args:
        folder: quantized by this project, or by a toolkit of `checkpoint.toolkits`.
        out: folder to write; must not exist, or be empty. Appears whole or not at all.
        to: one of `FORMATS`.
        eight_bit: of compressed-tensors: kept linears to store in 8 bits, by parts of their names or "*", see
            `export.eight_bit.choose`.
        plugin: owner, where two installed plugins claim the model.
        trust_remote_code: run the model folder's own code, where it has some, and carry it over.

    Raises:
        ConfigError: no such format; the model needs its own code; `eight_bit` with another format, or a name in it that
            means no kept linear.
        CheckpointError: `folder` is not quantized or cannot be read, or the format cannot hold it.
        OutputError: `out` is not empty, or the disk cannot take it.
    """
    if to not in FORMATS:
        raise ConfigError(f"{to!r} is no export format", hint=", ".join(FORMATS))
    if eight_bit and to != EIGHT_BIT:
        raise ConfigError(f"--to {to} holds no linears of 8 bits", hint=f"--to {EIGHT_BIT}, or leave out --eight-bit")
    target = Path(out)
    from awq_core.checkpoint.partial import PARTIAL
    from awq_core.export.source import open_source

    # Before the model is looked at. What an unfinished run left is judged by the writer, which knows whose it is.
    if target.is_file() or (target.is_dir() and any(path.name != PARTIAL for path in target.iterdir())):
        raise OutputError(f"{target} is there already, and not empty", hint="choose another --out")
    with open_source(folder, plugin=plugin, trust_remote_code=trust_remote_code) as source:
        if eight_bit:
            from awq_core.export.eight_bit import choose

            source = replace(source, eight_bit=choose(source, eight_bit))
        module = importlib.import_module(FORMATS[to][0])
        module.write(source, target, to)
        notes = module.notes(source) if hasattr(module, "notes") else ()
    nbytes = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Exported(target, to, len(source.linears), nbytes, tuple(source.eight_bit), notes)


def import_checkpoint(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    plugin: str | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Another toolkit's 4-bit folder as AWQ gemm, with its own codes, zero points and scales.

    Raises:
        as `export_checkpoint`.
    """
    return export_checkpoint(folder, out, "awq", plugin=plugin, trust_remote_code=trust_remote_code)
