"""What llama.cpp calls an architecture, and which of its numbers a file must tell.

llama.cpp builds each architecture from its own code: a file names one, and gives its sizes. The names of tensors are in
the `gguf` package; what is here is how each differs from the plain block. Every line was proved by running a file in
llama.cpp against transformers; what is not here is refused.

Rotary embedding: transformers turns the pair (i, i + d/2) of a head of width d. For some architectures llama.cpp turns
(2i, 2i + 1), as Meta's first code did. For those, rows of q and k change places:  row 2i + j  is  row i + j · d/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from awq_core.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Known:
    """An architecture of llama.cpp.

    Attributes:
        name: its name there.
        paired: its rotary embedding turns neighbouring pairs.
        norm_offset: what is added to the weights of norms: 1 where the model multiplies by 1 + weight.
        act: the activation it has built in.
        keys: more fields of the configuration, and the method of `gguf.GGUFWriter` that takes each.
    """

    name: str
    paired: bool = False
    norm_offset: float = 0.0
    act: tuple[str, ...] = ("silu", "swish")
    keys: dict[str, str] = field(default_factory=dict)


GRANITE = {
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}
KNOWN = {
    "llama": Known("llama", paired=True),
    "mistral": Known("llama", paired=True),
    "granite": Known("granite", paired=True, keys=GRANITE),
    "qwen2": Known("qwen2"),
    "qwen3": Known("qwen3"),
    "olmo2": Known("olmo2"),
    "gemma": Known("gemma", norm_offset=1.0, act=("gelu_pytorch_tanh",)),
}


def known(config: Any) -> Known:
    """The architecture of a configuration. Raises CheckpointError where llama.cpp's is not known, or computes another
    activation."""
    found = KNOWN.get(config.model_type)
    if found is None:
        raise CheckpointError(
            f"--to gguf does not know llama.cpp's form of {config.model_type}",
            hint="--to scaled-fp16, then llama.cpp's convert_hf_to_gguf.py",
        )
    act = getattr(config, "hidden_act", None)
    if act not in found.act:
        raise CheckpointError(f"llama.cpp's {found.name} computes {found.act[0]}, this model {act}", hint="--to onnx")
    return found


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
    heads, width = config.num_attention_heads, head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(vocabulary)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, method in arch.keys.items():
        getattr(writer, method)(getattr(config, key))
    rope = _rope(config)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("part of each head is not rotated, which --to gguf does not know", hint="--to onnx")
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def rope_factors(config: Any) -> torch.Tensor | None:
    """What the frequencies of the rotary embedding are divided by, float32 `[width / 2]`; None where it is 1.

    With wavelengths λ = 2π / frequency and the old context L: 1 where λ < L / high, `factor` where λ > L / low, and a
    straight line in L / λ between, of the frequency.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    width = head_width(config)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    share = ((old * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / factor)).float()


def paired_rows(heads: int, rows: int) -> torch.Tensor:
    """int64 `[rows]`: the row of q or k that llama.cpp wants in each place."""
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def head_width(config: Any) -> int:
    """Channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(config: Any) -> int:
    """The longest text: where a layer sees a window only, no longer than that, since llama.cpp shows it everything."""
    longest, window = int(config.max_position_embeddings), getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return min(longest, int(window)) if window and (kinds is None or "sliding_attention" in kinds) else longest


def _rope(config: Any) -> dict[str, Any]:
    """The rotary embedding's settings. Raises CheckpointError for a kind that is not known here."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    kind = rope.setdefault("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"--to gguf does not know the rotary embedding {kind!r}", hint="--to onnx")
    return rope
