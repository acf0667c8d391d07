"""What llama.cpp calls an architecture, and what it has built in.

llama.cpp builds each architecture from its own code: a file names one, and gives its sizes. The names of tensors are in
the `gguf` package; what is here is how each differs from the plain block. Every line was proved by running a file in
llama.cpp against transformers; what is not here is refused, and so is a configuration that says otherwise than the code
of llama.cpp, which would compute something else without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from awq_core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An architecture of llama.cpp.

    Attributes:
        name: its name there.
        paired: its rotary embedding turns neighbouring rows, that of transformers those half a head apart.
        grouped: q, k and v are one linear, whose rows go by groups of heads in transformers.
        partial: it can rotate a part of each head.
        windows: it hides from some layers what is farther back than the window.
        norm_offset: what is added to the weights of norms: 1 where the model multiplies by 1 + weight.
        eps: the field with what norms add to the variance, or that number; "rms_norm_eps" of RMS norms only.
        act: the activation it has built in.
        keys: more fields of the configuration, and the method of `gguf.GGUFWriter` that takes each; None is left out.
        fixed: fields it knows one value of, or a function of the configuration that gives the value.
    """

    name: str
    paired: bool = False
    grouped: bool = False
    partial: bool = False
    windows: bool = False
    norm_offset: float = 0.0
    eps: str | float = "rms_norm_eps"
    act: tuple[str, ...] = ("silu", "swish")
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# llama.cpp has the tanh form only; these were trained with the other, from which it differs by less than 0.0005.
GELU_TOO = (*GELU, "gelu")
GRANITE = {
    "embedding_multiplier": "add_embedding_scale",
    "residual_multiplier": "add_residual_scale",
    "attention_multiplier": "add_attention_scale",
    "logits_scaling": "add_logit_scale",
}
EXPERTS = {"num_experts": "add_expert_count", "num_experts_per_tok": "add_expert_used_count"}
EXPERT_WIDTH = {"moe_intermediate_size": "add_expert_feed_forward_length"}
SHARED_WIDTH = {"shared_expert_intermediate_size": "add_expert_shared_feed_forward_length"}
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
SOFTCAPS = {
    "attn_logit_softcapping": "add_attn_logit_softcapping",
    "final_logit_softcapping": "add_final_logit_softcapping",
}


def _gemma_scale(config: Any) -> int:
    """Gemma's queries are divided by the root of this; llama.cpp knows the largest model by its depth."""
    largest = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    return int(config.hidden_size // config.num_attention_heads if largest else config.head_dim)


def _one_in_four(config: Any) -> list[int]:
    return [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]


GEMMA_FIXED = {"query_pre_attn_scalar": _gemma_scale, "use_bidirectional_attention": (None, False)}
FALCON_FIXED = {"alibi": False, "parallel_attn": True, "bias": False}
GPT2_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

KNOWN = {
    "llama": Known(name="llama", paired=True),
    "mistral": Known(name="llama", paired=True),
    "mixtral": Known(name="llama", paired=True, keys={**EXPERTS, "num_local_experts": "add_expert_count"}),
    "granite": Known(name="granite", paired=True, keys=GRANITE),
    "qwen2": Known(name="qwen2"),
    "qwen3": Known(name="qwen3"),
    "qwen2_moe": Known(
        name="qwen2moe",
        keys={**EXPERTS, **EXPERT_WIDTH, **SHARED_WIDTH},
        fixed={**ALL_SPARSE, "norm_topk_prob": False},
    ),
    "qwen3_moe": Known(name="qwen3moe", keys={**EXPERTS, **EXPERT_WIDTH}, fixed={**ALL_SPARSE, "norm_topk_prob": True}),
    "olmo": Known(name="olmo", paired=True, eps=1e-5, keys={"clip_qkv": "add_clamp_kqv"}),
    "olmo2": Known(name="olmo2"),
    "olmo3": Known(name="olmo2", windows=True),
    "olmoe": Known(name="olmoe", keys=EXPERTS, fixed={"norm_topk_prob": False, "clip_qkv": None}),
    "gemma": Known(name="gemma", norm_offset=1.0, act=GELU),
    "gemma2": Known(name="gemma2", norm_offset=1.0, act=GELU, windows=True, keys=SOFTCAPS, fixed=GEMMA_FIXED),
    "gemma3_text": Known(
        name="gemma3",
        norm_offset=1.0,
        act=GELU,
        windows=True,
        keys={"final_logit_softcapping": "add_final_logit_softcapping"},
        fixed={**GEMMA_FIXED, "attn_logit_softcapping": None},
    ),
    "phi": Known(name="phi2", eps="layer_norm_eps", act=GELU, partial=True, fixed={"qk_layernorm": False}),
    "phi3": Known(name="phi3", partial=True),
    "starcoder2": Known(name="starcoder2", eps="norm_epsilon", act=GELU, fixed={"use_bias": True}),
    "stablelm": Known(name="stablelm", eps="layer_norm_eps", partial=True, fixed={"qk_layernorm": False}),
    "cohere": Known(
        name="command-r", eps="layer_norm_eps", keys={"logit_scale": "add_logit_scale"}, fixed={"use_qk_norm": False}
    ),
    "cohere2": Known(name="cohere2", eps="layer_norm_eps", windows=True, keys={"logit_scale": "add_logit_scale"}),
    "glm4": Known(name="glm4", partial=True),
    "gpt2": Known(name="gpt2", eps="layer_norm_epsilon", act=GELU, fixed=GPT2_FIXED),
    "gpt_neox": Known(
        name="gptneox",
        eps="layer_norm_eps",
        act=GELU_TOO,
        grouped=True,
        partial=True,
        keys={"use_parallel_residual": "add_parallel_residual"},
        fixed={"attention_bias": True},
    ),
    "falcon": Known(name="falcon", eps="layer_norm_epsilon", act=GELU_TOO, grouped=True, fixed=FALCON_FIXED),
    "nemotron": Known(name="nemotron", eps="norm_eps", act=("relu2",), norm_offset=1.0, partial=True),
    "exaone4": Known(name="exaone4", fixed={"sliding_window": None}),
    "smollm3": Known(name="smollm3", paired=True, fixed={"no_rope_layers": _one_in_four}),
}
ACTS = ("hidden_act", "hidden_activation", "activation_function", "activation")


def known(config: Any) -> Known:
    """The architecture of a configuration. Raises CheckpointError where llama.cpp's is not known, or computes something
    else."""
    found = KNOWN.get(config.model_type)
    if found is None:
        raise CheckpointError(
            f"--to gguf does not know llama.cpp's form of {config.model_type}",
            hint="--to scaled-fp16, then llama.cpp's convert_hf_to_gguf.py",
        )
    act = next((getattr(config, name) for name in ACTS if getattr(config, name, None)), None)
    if act not in found.act:
        raise CheckpointError(f"llama.cpp's {found.name} computes {found.act[0]}, this model {act}", hint="--to onnx")
    for name, value in found.fixed.items():
        wanted = value(config) if callable(value) else value
        given = getattr(config, name, None)
        if given not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise CheckpointError(f"llama.cpp's {found.name} has {name} {wanted}, this model {given}", hint="--to onnx")
    return found
