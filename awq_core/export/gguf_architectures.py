"""What llama.cpp calls an architecture, and what it has built in.

llama.cpp builds each architecture from its own code: a file names one, and gives its sizes. The names of tensors are in
the `gguf` package; what is here is how each differs from the plain block. Every line was proved by running a file in
llama.cpp against transformers; what is not here is refused, and so is a configuration that says otherwise than the code
of llama.cpp, which would compute something else without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from awq_core.errors import CheckpointError

Keys = Mapping[str, str | Callable[[Any], Any]]


@dataclass(frozen=True, slots=True)
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
        keys: more that a file must tell: a method of `gguf.GGUFWriter`, and the field of the configuration that it
            takes, or a function of that; None is left out.
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
    keys: Keys = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


def _gemma_scale(config: Any) -> int:
    """Gemma divides queries by the root of this; llama.cpp knows the largest model by its depth."""
    largest = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    return int(config.hidden_size // config.num_attention_heads if largest else config.head_dim)


def _one_in_four(config: Any) -> list[int]:
    return [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]


def _last_layer(config: Any) -> tuple[int, int]:
    return -1, config.num_hidden_layers - 1


def _share(config: Any) -> tuple[None, int]:
    return None, config.hidden_size // config.num_attention_heads


def _heads(config: Any) -> int:
    return int(config.num_attention_heads)


def _query_rank(config: Any) -> int:
    return int(config.q_lora_rank or 0)


def _sigmoid(config: Any) -> Any:
    import gguf

    return gguf.ExpertGatingFuncType.SIGMOID


def _shared_width(config: Any) -> int:
    return int(config.moe_num_shared_experts * config.moe_intermediate_size)


GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
# llama.cpp has the tanh form only; these were trained with the other, from which it differs by less than 0.0005.
GELU_TOO = (*GELU, "gelu")
LOGITS = {"add_logit_scale": "logit_scale"}
GRANITE = {
    "add_embedding_scale": "embedding_multiplier",
    "add_residual_scale": "residual_multiplier",
    "add_attention_scale": "attention_multiplier",
    "add_logit_scale": "logits_scaling",
}
SOFTCAP = {"add_final_logit_softcapping": "final_logit_softcapping"}
SOFTCAPS = {**SOFTCAP, "add_attn_logit_softcapping": "attn_logit_softcapping"}
EXPERTS = {"add_expert_count": "num_experts", "add_expert_used_count": "num_experts_per_tok"}
WIDE_EXPERTS = {**EXPERTS, "add_expert_feed_forward_length": "moe_intermediate_size"}
LOCAL_EXPERTS = {**EXPERTS, "add_expert_count": "num_local_experts"}
QWEN2_EXPERTS = {**WIDE_EXPERTS, "add_expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
GLM_EXPERTS = {
    **WIDE_EXPERTS,
    "add_expert_count": "n_routed_experts",
    "add_expert_shared_count": "n_shared_experts",
    "add_leading_dense_block_count": "first_k_dense_replace",
    "add_expert_weights_scale": "routed_scaling_factor",
    "add_expert_weights_norm": "norm_topk_prob",
}
# llama.cpp takes latent attention as it is stored, too, if it is not told the widths of heads that it would split.
DEEPSEEK: Keys = {**GLM_EXPERTS, "add_q_lora_rank": _query_rank, "add_kv_lora_rank": "kv_lora_rank"}
DEEPSEEK3: Keys = {
    **DEEPSEEK,
    "add_expert_gating_func": _sigmoid,
    "add_expert_group_count": "n_group",
    "add_expert_group_used_count": "topk_group",
}
ERNIE_EXPERTS: Keys = {
    "add_expert_count": "moe_num_experts",
    "add_expert_used_count": "moe_k",
    "add_expert_feed_forward_length": "moe_intermediate_size",
    "add_expert_shared_count": "moe_num_shared_experts",
    "add_expert_shared_feed_forward_length": _shared_width,
    "add_leading_dense_block_count": "moe_layer_start_index",
    "add_interleave_moe_layer_step": "moe_layer_interval",
}
SQUARE = {"head_dim": _share}  # as many channels in all heads as outside
UNTIED = {"tie_word_embeddings": False}
ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
GEMMA_FIXED = {"query_pre_attn_scalar": _gemma_scale, "use_bidirectional_attention": (None, False)}
GPT_FIXED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": (None, False), "add_cross_attention": False}

KNOWN = {
    "llama": Known("llama", paired=True),
    "smollm3": Known("smollm3", paired=True, fixed={"no_rope_layers": _one_in_four}),
    "mistral": Known("llama", paired=True),
    "ministral": Known("llama", paired=True),
    "mixtral": Known("llama", paired=True, keys=LOCAL_EXPERTS),
    "qwen2": Known("qwen2"),
    "qwen2_moe": Known("qwen2moe", keys=QWEN2_EXPERTS, fixed={**UNTIED, **ALL_SPARSE, "norm_topk_prob": False}),
    "qwen3": Known("qwen3"),
    "qwen3_moe": Known("qwen3moe", keys=WIDE_EXPERTS, fixed={**ALL_SPARSE, "norm_topk_prob": True}),
    "gemma": Known("gemma", norm_offset=1.0, act=GELU),
    "gemma2": Known("gemma2", norm_offset=1.0, act=GELU, windows=True, keys=SOFTCAPS, fixed=GEMMA_FIXED),
    "gemma3_text": Known(
        "gemma3",
        norm_offset=1.0,
        act=GELU,
        windows=True,
        keys=SOFTCAP,
        fixed={**GEMMA_FIXED, "attn_logit_softcapping": None},
    ),
    "phi": Known("phi2", eps="layer_norm_eps", act=GELU, partial=True, fixed={**UNTIED, "qk_layernorm": False}),
    "phi3": Known("phi3", partial=True),
    "olmo": Known("olmo", paired=True, eps=1e-5, keys={"add_clamp_kqv": "clip_qkv"}),
    "olmo2": Known("olmo2", fixed=UNTIED),
    "olmo3": Known("olmo2", windows=True, fixed=UNTIED),
    "olmoe": Known(
        "olmoe",
        keys=EXPERTS,
        fixed={**UNTIED, "num_key_value_heads": _heads, "norm_topk_prob": False, "clip_qkv": None},
    ),
    "granite": Known("granite", paired=True, keys=GRANITE),
    "granitemoe": Known("granitemoe", paired=True, keys={**GRANITE, **LOCAL_EXPERTS}),
    "cohere": Known("command-r", eps="layer_norm_eps", keys=LOGITS, fixed={"use_qk_norm": False}),
    "cohere2": Known("cohere2", eps="layer_norm_eps", windows=True, keys=LOGITS, fixed=SQUARE),
    "glm": Known("chatglm", partial=True, fixed=SQUARE),
    "glm4": Known("glm4", partial=True),
    "glm4_moe": Known("glm4moe", partial=True, keys=GLM_EXPERTS, fixed={"n_group": 1, "topk_group": 1}),
    "deepseek_v2": Known(
        "deepseek2", partial=True, keys=DEEPSEEK, fixed={"topk_method": "greedy", "norm_topk_prob": False}
    ),
    "deepseek_v3": Known("deepseek2", partial=True, keys=DEEPSEEK3, fixed={"rope_interleave": True}),
    "ernie4_5": Known("ernie4_5", fixed={"use_bias": False}),
    "ernie4_5_moe": Known(
        "ernie4_5-moe", keys=ERNIE_EXPERTS, fixed={"use_bias": False, "moe_layer_end_index": _last_layer}
    ),
    "exaone4": Known("exaone4", fixed={**SQUARE, "sliding_window": None}),
    "nemotron": Known(
        "nemotron", eps="norm_eps", act=("relu2",), norm_offset=1.0, partial=True, fixed={**SQUARE, **UNTIED}
    ),
    "stablelm": Known("stablelm", eps="layer_norm_eps", partial=True, fixed={**UNTIED, "qk_layernorm": False}),
    "starcoder2": Known("starcoder2", eps="norm_epsilon", act=GELU, fixed={"use_bias": True}),
    "falcon": Known(
        "falcon",
        eps="layer_norm_epsilon",
        act=GELU_TOO,
        grouped=True,
        fixed={"alibi": False, "parallel_attn": True, "bias": False},
    ),
    "gpt2": Known("gpt2", eps="layer_norm_epsilon", act=GELU, fixed=GPT_FIXED),
    "gpt_bigcode": Known("starcoder", eps="layer_norm_epsilon", act=GELU, fixed={**GPT_FIXED, "multi_query": True}),
    "gpt_neox": Known(
        "gptneox",
        eps="layer_norm_eps",
        act=GELU_TOO,
        grouped=True,
        partial=True,
        keys={"add_parallel_residual": "use_parallel_residual"},
        fixed={**UNTIED, "attention_bias": True},
    ),
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
        raise CheckpointError(
            f"llama.cpp's {found.name} computes {found.act[0]}, this model {act}", hint="--to scaled-fp16"
        )
    for name, value in found.fixed.items():
        wanted = value(config) if callable(value) else value
        given = getattr(config, name, None)
        if given not in (wanted if isinstance(wanted, tuple) else (wanted,)):
            raise CheckpointError(
                f"llama.cpp's {found.name} has {name} {wanted}, this model {given}", hint="--to scaled-fp16"
            )
    return found


def head_width(config: Any) -> int:
    """Channels of a query."""
    given = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)
