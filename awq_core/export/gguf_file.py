"""GGUF: one file for llama.cpp, with the model's sizes (`gguf_sizes`, `gguf_rope`), its tokenizer (`gguf_tokenizer`),
and its weights (`gguf_tensors`).

Where matrices are multiplied out, llama.cpp's own quantizer can go on: scales and clips are in them. One tensor is in
memory at a time; of a mixture, that is one projection of all of a layer's experts.
"""

from __future__ import annotations

from pathlib import Path

from awq_core.export.card import Card
from awq_core.export.gguf_architectures import known
from awq_core.export.gguf_blocks import Fidelity
from awq_core.export.gguf_rope import add_rope
from awq_core.export.gguf_sizes import add_sizes
from awq_core.export.gguf_tensors import plan
from awq_core.export.gguf_tokenizer import add_tokenizer
from awq_core.export.source import Source
from awq_core.export.staging import put, require, staged
from awq_core.export.writing import small_files
from awq_core.model_folder import load_config

FILE = "model.gguf"
USE = f"```\nllama-cli -m NAME/{FILE}\n```"


def write(source: Source, out: Path, to: str = "gguf") -> None:
    """Write `source` as `model.gguf`; its card says how near the weights are.

    Args:
        to: "gguf", or "gguf-fp16" for no Q4_1.

    Raises:
        CheckpointError: an architecture, a tensor or a tokenizer that llama.cpp does not have, as far as known here.
        ConfigError: the package gguf is missing.
        NumericsError: scales or weights that float16 cannot hold.
        OutputError: `out` is not empty, holds an unfinished run, or the disk cannot take it.
    """
    require("gguf", "gguf")
    import gguf

    config = load_config(source.folder, trust_remote_code=source.code)
    arch = known(config)
    tensors = plan(source, config, arch, packed=to == "gguf")
    vocabulary = next(tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    with staged(out) as stage:
        writer = gguf.GGUFWriter(stage / FILE, arch.name)
        writer.add_name(source.folder.resolve().name)
        packed = any(tensor.kind == "Q4_1" for tensor in tensors)
        add_sizes(writer, config, arch, vocabulary, packed=packed)
        add_rope(writer, config, arch)
        add_tokenizer(writer, source.folder, vocabulary, trust_remote_code=source.code)
        for tensor in tensors:
            # For a dtype the writer does not know, the type is what counts.
            kind = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        total = Fidelity()
        for tensor in tensors:
            array, fidelity = tensor.read()
            writer.write_tensor_data(array)
            total += fidelity
        writer.close()
        text = f"GGUF, AWQ's 4-bit codes as Q4_1: {total}" if packed else "GGUF, AWQ's weights in 16 bits"
        card = Card(title="AWQ 4-bit, GGUF", tags=("gguf", "awq", "4-bit", "int4"), format=text, use=USE)
        files = small_files(source, None, card)
        put(stage, {name: files[name] for name in ("config.json", "README.md")})
