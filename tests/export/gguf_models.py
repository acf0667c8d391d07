"""Tiny models of every architecture that `--to gguf` knows, with the demo model's tokenizer."""

from pathlib import Path

import torch

import awq_core

ROOT = Path(__file__).parents[2]
ROPE3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# What a tiny model of an architecture has more than the others, so that what is special about it shows.
SPECIAL = {
    "llama": {"attention_bias": True, "rope_parameters": ROPE3},
    "mistral": {"head_dim": 32, "sliding_window": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": {**MOE, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**MOE, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
    "olmo": {"clip_qkv": 0.5},
    "olmo3": {**WINDOW, "rope_parameters": {**BASES, "full_attention": BASES["sliding_attention"]}},
    "olmoe": {**MOE, "num_key_value_heads": 4},
    "gemma": {"head_dim": 32},
    "gemma2": {**WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": BASES},
    "granite": MULTIPLIERS,
    "granitemoe": {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": {**HALF, "head_dim": 16},
    "glm4_moe": {**HALF, "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                 "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True},
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {**LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "ernie4_5": {"head_dim": 32},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2,
                     "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    "ministral": {"head_dim": 32},
    "phi": HALF,
    "phi3": {**HALF, "pad_token_id": 0},
    "stablelm": {**HALF, "use_qkv_bias": True},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**WINDOW, "logit_scale": 0.5, "head_dim": 16},
    "glm4": {**HALF, "head_dim": 32},
    "gpt2": {"num_key_value_heads": 4, "n_inner": 96},
    "gpt_bigcode": {"n_inner": 96},
    "gpt_neox": {**HALF, "num_key_value_heads": 4, "use_parallel_residual": True},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "nemotron": {**HALF, "head_dim": 16},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": 0},
}  # fmt: skip
OLD = {"original_max_position_embeddings": 16, "rope_theta": 10000.0}
YARN = {**OLD, "rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5, "beta_fast": 4.0}
LATENT_YARN = {**YARN, "attention_factor": None}
LONG = {**OLD, "rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.0, 3.0, 5.0, 9.0],
        "partial_rotary_factor": 0.5}  # fmt: skip
SHORT = {**LONG, "original_max_position_embeddings": 256}
# Other forms of an architecture, beside its tiny model.
FORMS = {
    "deepseek_v2, yarn": ("deepseek_v2", {"rope_parameters": {**LATENT_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
    "deepseek_v3, yarn": ("deepseek_v3", {"rope_parameters": {**LATENT_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek_v2, one query": ("deepseek_v2", {"q_lora_rank": None}),
    "falcon, one key head": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "glm4_moe, no norms of heads": ("glm4_moe", {"use_qk_norm": False}),
    "gpt_neox, one after another": ("gpt_neox", {"use_parallel_residual": False}),
    "llama, linear": ("llama", {"rope_parameters": BASES["full_attention"]}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
    "olmo3, yarn": ("olmo3", {"rope_parameters": {**BASES, "full_attention": YARN}}),
    "phi3, long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "phi3, short": (
        "phi3",
        {"rope_parameters": SHORT, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": None}}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
}


def tiny_config(name, **more):
    """A tiny model's configuration, of a model type."""
    from transformers import AutoConfig

    from awq_core.testing import TINY_DECODER

    options = {**TINY_DECODER, "vocab_size": 4096, "max_position_embeddings": 256, **SPECIAL.get(name, {}), **more}
    return AutoConfig.for_model(name, **options)


def quantized(config, folder, group_size=32, dtype=torch.float32, **more):
    """A tiny model with the demo model's tokenizer."""
    from awq_core.testing import save_tiny

    save_tiny(config, folder / "source", dtype=dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).write_bytes((ROOT / "examples" / "pycoder" / name).read_bytes())
    settings = awq_core.QuantConfig(group_size=group_size, scale=False, clip="none", **more)
    awq_core.quantize(folder / "source", folder / "DIR", config=settings)
    return folder / "DIR"


def opened(folder):
    """Tensors by name, `(type, values)`, and the other fields of a file."""
    import gguf

    reader = gguf.GGUFReader(folder / "model.gguf")
    return (
        {one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors},
        {name: field.contents() for name, field in reader.fields.items()},
    )
