"""The sizes and constants of a model: from a configuration of transformers to the keys that llama.cpp reads."""

from __future__ import annotations

from typing import Any

from awq_core.export.gguf_architectures import Known, head_width


def add_sizes(writer: Any, config: Any, arch: Known, vocabulary: int, *, packed: bool) -> None:
    """Write the sizes and constants of a configuration to a `gguf.GGUFWriter`.

    Args:
        packed: there are tensors in Q4_1.
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
    writer.add_value_length(int(getattr(config, "v_head_dim", None) or head_width(config)))
    writer.add_vocab_size(vocabulary)
    if arch.eps == "rms_norm_eps":
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, arch.eps) if isinstance(arch.eps, str) else arch.eps)
    for method, given in arch.keys.items():
        value = getattr(config, given, None) if isinstance(given, str) else given(config)
        if value is not None:
            getattr(writer, method)(value)
    if arch.windows:
        writer.add_sliding_window(int(config.sliding_window or config.max_position_embeddings))
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


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
