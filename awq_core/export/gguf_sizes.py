"""The sizes and constants of a model: from a configuration of transformers to the keys that llama.cpp reads."""

from __future__ import annotations

import math
from typing import Any

import torch

from awq_core.errors import CheckpointError
from awq_core.export.gguf_architectures import Known


def add_sizes(writer: Any, config: Any, arch: Known, vocabulary: int, *, packed: bool) -> None:
    """Write the sizes and constants of a configuration to a `gguf.GGUFWriter`.

    Args:
        packed: there are tensors in Q4_1.

    Raises:
        CheckpointError: a rotary embedding that llama.cpp, or this, does not know.
    """
    import gguf

    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1 if packed else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config, arch))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_inner(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(kv_heads(config))
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_vocab_size(vocabulary)
    if arch.eps == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, arch.eps) if isinstance(arch.eps, str) else arch.eps)
    for method, given in arch.keys.items():
        value = getattr(config, given, None) if isinstance(given, str) else given(config)
        if value is not None:
            getattr(writer, method)(value)
    _add_rope(writer, config, arch)
    if arch.windows:
        writer.add_sliding_window(int(config.sliding_window or config.max_position_embeddings))
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(float((_rope(config, "sliding_attention") or {})["rope_theta"]))


def _add_rope(writer: Any, config: Any, arch: Known) -> None:
    import gguf

    rope = _rope(config)
    if rope is None:
        return
    rotated = rotated_width(config)
    if rotated != head_width(config) and not arch.partial:
        raise CheckpointError(
            f"llama.cpp's {arch.name} rotates whole heads, this model a part of each", hint="--to onnx"
        )
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any) -> torch.Tensor | None:
    """What the frequencies of the rotary embedding are divided by, float32 `[width / 2]`; None where it is 1.

    With wavelengths λ = 2π / frequency and the old context L: 1 where λ < L / high, `factor` where λ > L / low, and a
    straight line in L / λ between, of the frequency.
    """
    rope = _rope(config)
    if rope is None or rope["rope_type"] != "llama3":
        return None
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    width = rotated_width(config)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    share = ((old * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / factor)).float()


def head_width(config: Any) -> int:
    """Channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated_width(config: Any) -> int:
    """How many of them the rotary embedding turns."""
    rope = _rope(config) or {}
    return int(head_width(config) * (rope.get("partial_rotary_factor") or 1.0))


def kv_heads(config: Any) -> int:
    """Heads of keys and values."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return int(config.num_attention_heads)


def _inner(config: Any) -> int:
    """Channels inside the MLP."""
    for name in ("intermediate_size", "ffn_hidden_size", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * int(config.hidden_size)


def _context(config: Any, arch: Known) -> int:
    """The longest text: where a layer sees a window only, and llama.cpp shows it everything, no longer than that."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window and not arch.windows and (kinds is None or "sliding_attention" in kinds):
        return min(longest, int(window))
    return longest


def _rope(config: Any, layers: str = "full_attention") -> dict[str, Any] | None:
    """The rotary embedding's settings in layers of one kind; None where there is none.

    Raises:
        CheckpointError: a kind of embedding that is not known here.
    """
    given = getattr(config, "rope_parameters", None)
    if not given:
        return None
    rope = dict(given.get(layers, given))
    kind = rope.setdefault("rope_type", "default")
    known = ("default",) if layers in given and layers == "sliding_attention" else ("default", "linear", "llama3")
    if kind not in known:
        raise CheckpointError(f"--to gguf does not know the rotary embedding {kind!r}", hint="--to onnx")
    rope.setdefault("rope_theta", 10000.0)
    return rope
