"""DeepSeek V2, V3 (and R1), V3.2: multi-head latent attention before a dense or a mixture-of-experts MLP; V4.

    input_layernorm -> q_a, kv_a          q_a_layernorm -> q_b          kv_a_layernorm -> kv_b          kv_b -> o
    post_attention_layernorm -> experts' gate and up, the shared experts', the router          up -> down

The norms within the attention divide by the size of what they read, so nothing folds into q_a and kv_a, whose last
rows are the rotated part of the keys besides. `kv_b` writes keys without position and values, head by head; the
values are the last `v_head_dim` rows of each head. V2 Lite has `q_proj` for q_a, norm and q_b.

The router's correction bias is added behind a sigmoid, so its weight alone is multiplied by the scales. The first
layers are dense. V3.2's indexer, which chooses the tokens that a query attends to, reads the block's norm and the
query's latent norm; it is small, and kept.

V4 has one key-value head, whose norm feeds keys and values alike, so nothing folds there; `o_a` is a product a group of
heads and is kept, its rows take up the scales of `o_b`. Compressors of keys and values read the block's norm too.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
EITHER_MLP = (*presets.gated_mlp(optional=True), *presets.moe_mlp(shared="mlp.shared_experts", optional=True))
FUSED = (*presets.fused_mlp(), *presets.fused_mlp("mlp.shared_experts"), *presets.fused_norms())
LATENT = presets.latent_attention()
INDEXER = {
    "input_layernorm": ("self_attn.indexer.wk", "self_attn.indexer.weights_proj"),
    "self_attn.q_a_layernorm": ("self_attn.indexer.wq_b",),
}

DEEPSEEK = Architecture(
    family="deepseek",
    model_types=("deepseek_v2", "deepseek_v3"),
    stacks=(LANGUAGE,),
    scale_groups=(*LATENT, *EITHER_MLP),
    fused=FUSED,
)
INDEXED = Architecture(
    family="deepseek",
    model_types=("deepseek_v32",),
    stacks=(LANGUAGE,),
    scale_groups=(*(replace(group, compensate=INDEXER.get(group.prev, ())) for group in LATENT), *EITHER_MLP),
    fused=FUSED,
)
ATTN, COMPRESSOR = "self_attn", "self_attn.compressor"
CHOICE = f"{COMPRESSOR}.indexer"
V4_MLP, *_ = presets.moe_mlp(gate="w1", up="w3", down="w2")
V4 = Architecture(
    family="deepseek",
    model_types=("deepseek_v4",),
    stacks=(LANGUAGE,),
    scale_groups=(
        ScaleGroup(prev="input_layernorm", layers=(f"{ATTN}.q_a_proj", f"{ATTN}.kv_proj")),
        ScaleGroup(prev=f"{ATTN}.q_a_norm", layers=(f"{ATTN}.q_b_proj",)),
        ScaleGroup(prev=f"{ATTN}.o_a_proj", layers=(f"{ATTN}.o_b_proj",)),
        replace(V4_MLP, layers=(*V4_MLP.layers, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")),
    ),
    # These read what up wrote, clamped: a clamp moves when what it clamps is divided.
    exempt=("mlp.experts.*.w2", "mlp.shared_experts.down_proj"),
    keep=(f"{ATTN}.o_a_proj",),  # one product a group of heads, on its own slice of the weight
)


@hookimpl
def awq_architectures():
    return (DEEPSEEK, INDEXED, V4)


@hookimpl
def awq_scale_groups(arch, block):
    """V4's layers with a compressor of keys and values, and with an indexer of what it gives."""
    compressor = block.self_attn.compressor if arch is V4 else None
    if compressor is None:
        return None
    norm, query, *others = arch.scale_groups
    norm = replace(norm, layers=(*norm.layers, f"{COMPRESSOR}.kv_proj", f"{COMPRESSOR}.gate_proj"))
    if hasattr(compressor, "indexer"):
        readers = tuple(f"{CHOICE}.{name}" for name in ("kv_proj", "gate_proj", "scorer.weights_proj"))
        norm = replace(norm, compensate=readers)
        query = replace(query, compensate=(f"{CHOICE}.q_b_proj",))
    return (norm, query, *others)


@hookimpl
def awq_prepare_model(arch, model):
    from awq_core.modules import unstack_experts

    names = ("w1", "w3", "w2") if arch is V4 else ("gate_proj", "up_proj", "down_proj")
    return unstack_experts(model, "mlp.experts", names)
