"""The rotary embedding, from transformers' `rope_parameters` to llama.cpp's keys and tensors.

    default     frequencies f = base^(-2i / width)
    linear      f / factor
    yarn        f, or f / factor, or a mixture, by wavelength; queries and keys times an attention factor
    llama3      f / divisors, a tensor of the file (`rope_freqs`)
    longrope    f / one of two lists of divisors, tensors both, the second for long contexts; an attention factor

Layers with a window may have a base of their own, and nothing else.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from awq_core.errors import CheckpointError
from awq_core.export.gguf_architectures import Known, head_width

KINDS = ("default", "linear", "yarn", "llama3", "longrope")


def add_rope(writer: Any, config: Any, arch: Known) -> None:
    """Write the rotary embedding of a configuration, where it has one, to a `gguf.GGUFWriter`.

    Raises:
        CheckpointError: an embedding that llama.cpp, or this, does not know.
    """
    import gguf

    rope = _rope(config)
    if rope is None:
        return
    rotated = _rotated(config, rope)
    if rotated != head_width(config) and not arch.partial:
        raise CheckpointError(
            f"llama.cpp's {arch.name} rotates whole heads, this model a part of each", hint="--to scaled-fp16"
        )
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(_attention_factor(config, rope))
    if kind == "yarn":
        _add_yarn(writer, rope, latent="add_kv_lora_rank" in arch.keys)
    if arch.windows:
        inside = _rope(config, "sliding_attention") or rope
        if inside["rope_type"] != "default" and "sliding_attention" in config.rope_parameters:
            raise CheckpointError(
                f"--to gguf does not know the rotary embedding {inside['rope_type']!r} of layers with a window",
                hint="--to scaled-fp16",
            )
        writer.add_rope_freq_base_swa(float(inside["rope_theta"]))


def _add_yarn(writer: Any, rope: dict[str, Any], *, latent: bool) -> None:
    """With latent attention, queries and keys are multiplied before the rotation: `mscale_all_dim` says by how much,
    and llama.cpp takes `mscale`, which is for the rotated part, to be the same."""
    inside, over_all = float(rope.get("mscale") or 0), float(rope.get("mscale_all_dim") or 0)
    fits = inside == over_all > 0 and rope.get("attention_factor") is None
    if not rope.get("truncate", True) or not (fits if latent else not (inside or over_all)):
        raise CheckpointError("--to gguf does not know this form of yarn", hint="--to scaled-fp16")
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
    if latent:
        writer.add_rope_scaling_yarn_log_mul(0.1 * over_all)


def rope_divisors(config: Any) -> dict[str, torch.Tensor]:
    """What the frequencies are divided by, float32 `[rotated / 2]`, by the name that `gguf` knows the tensor by."""
    rope = _rope(config)
    if rope is not None and rope["rope_type"] == "llama3":
        return {"rope.freqs": _by_wavelength(rope, _rotated(config, rope))}
    if rope is not None and rope["rope_type"] == "longrope":
        return {f"rope_factors_{kind}": torch.tensor(rope[f"{kind}_factor"]).float() for kind in ("long", "short")}
    return {}


def _by_wavelength(rope: dict[str, Any], width: int) -> torch.Tensor:
    """With wavelengths λ = 2π / frequency and the old context L: 1 where λ < L / high, `factor` where λ > L / low, and
    a straight line in L / λ between, of the frequency."""
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    frequencies = rope["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    share = ((old * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return (1 / (share + (1 - share) / factor)).float()


def _attention_factor(config: Any, rope: dict[str, Any]) -> float:
    """What llama.cpp is to multiply queries and keys by; for yarn, beside 1 + ln(factor) / 10, which it does itself."""
    given, old = rope.get("attention_factor"), int(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "yarn":
        return 1.0 if given is None else given / (1 + 0.1 * math.log(rope["factor"]))
    factor = rope.get("factor") or config.max_position_embeddings / old
    return float(given or math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(old)))


def _rotated(config: Any, rope: dict[str, Any]) -> int:
    """How many channels of a head are rotated."""
    if getattr(config, "qk_rope_head_dim", None):
        return int(config.qk_rope_head_dim)
    return int(head_width(config) * (rope.get("partial_rotary_factor") or 1.0))


def _rope(config: Any, layers: str = "full_attention") -> dict[str, Any] | None:
    """The settings in layers of one kind; None where there is no rotary embedding.

    Raises:
        CheckpointError: a kind of embedding that is not known here.
    """
    given = getattr(config, "rope_parameters", None)
    if not given:
        return None
    rope = dict(given.get(layers, given))
    rope.setdefault("rope_theta", 10000.0)
    kind = rope.setdefault("rope_type", "default")
    if kind not in KINDS:
        raise CheckpointError(f"--to gguf does not know the rotary embedding {kind!r}", hint="--to scaled-fp16")
    return rope
