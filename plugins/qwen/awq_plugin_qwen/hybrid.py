"""Qwen3-Next and the language model of Qwen 3.5. Most blocks have linear attention (a gated delta net) where the others
have attention with a gate, and norms multiply by 1 + w.

    input_layernorm -> q (with the gate), k, v         v -> o, for what stands between is a product
    input_layernorm -> in_proj of q, k, v, z, b, a     b and a, a number a head each, stay as they are
    norm(S) * silu(z) -> out_proj                      that norm works head by head, with one weight for all heads

The last is a group whose scales are the same in every head. That norm multiplies by its weight alone.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, FusedBlock, LayerStack, ScaleGroup, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
EITHER_MLP = presets.gated_mlp(norm_offset=1.0, optional=True)
MIXTURE = presets.moe_mlp(
    shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate", norm_offset=1.0, optional=True
)

DELTA = "linear_attn"
HYBRID = Architecture(
    family="qwen",
    model_types=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    stacks=(LANGUAGE,),
    scale_groups=(
        *(replace(group, optional=True) for group in presets.attention(norm_offset=1.0)),
        ScaleGroup(  # Qwen3-Next
            prev="input_layernorm",
            layers=(f"{DELTA}.in_proj_qkvz",),
            compensate=(f"{DELTA}.in_proj_ba",),
            no_clip=(f"{DELTA}.in_proj_qkvz",),
            norm_offset=1.0,
            optional=True,
        ),
        ScaleGroup(  # Qwen 3.5
            prev="input_layernorm",
            layers=(f"{DELTA}.in_proj_qkv", f"{DELTA}.in_proj_z"),
            compensate=(f"{DELTA}.in_proj_b", f"{DELTA}.in_proj_a"),
            no_clip=(f"{DELTA}.in_proj_qkv",),
            norm_offset=1.0,
            optional=True,
        ),
        ScaleGroup(prev=f"{DELTA}.norm", layers=(f"{DELTA}.out_proj",), head_dim=f"{DELTA}.head_v_dim", optional=True),
        *EITHER_MLP,
        *MIXTURE,
    ),
    fused=(
        *presets.fused_attention(),
        FusedBlock(
            match=DELTA,
            parts=("in_proj_qkv", "in_proj_z"),
            factory="awq_core.modules.merged:merge_products",
            name="qkv-z",
        ),
        *presets.fused_mlp(),
        *presets.fused_mlp("mlp.shared_expert"),
    ),
)
