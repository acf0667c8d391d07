"""Cohere's Command R and R7B, Command A, and Aya Vision.

Attention and MLP stand side by side: one norm feeds query, key, value, gate and up (and, in the mixtures, the router,
every expert and the shared experts), and both results are added to the residual. So there is one group where Llama's
block has two. The norm is a LayerNorm without bias; those on query and key, where there are any, take no part.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
V_TO_O, UP_TO_DOWN = presets.attention()[1], presets.gated_mlp()[1]

COHERE = Architecture(
    family="cohere",
    model_types=("cohere", "cohere2"),
    stacks=(LANGUAGE,),
    scale_groups=(
        ScaleGroup(prev="input_layernorm", layers=(*QKV, *MLP), no_clip=QKV[:2]),
        V_TO_O,
        UP_TO_DOWN,
    ),
    fused=(*presets.fused_attention(), *presets.fused_mlp()),
)
COHERE2_MOE = Architecture(
    family="cohere",
    model_types=("cohere2_moe",),
    stacks=(LANGUAGE,),
    scale_groups=COHERE.scale_groups,
    fused=(*COHERE.fused, *presets.fused_mlp("mlp.shared_experts")),
)
VISION = Architecture(
    family="cohere",
    model_types=("aya_vision", "cohere2_vision"),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_tower.encoder.layers"),
        LayerStack(component="projector", blocks="model.multi_modal_projector"),
        LayerStack(
            component="language",
            blocks="model.language_model.layers",
            groups_from="text_config",
            prelude=("model.vision_tower.head",),  # its attention reads a linear's weight without calling it
        ),
    ),
    components=presets.LANGUAGE_ALONE,
)


@hookimpl
def awq_architectures():
    return (COHERE, COHERE2_MOE, VISION)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not COHERE2_MOE:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")


@hookimpl
def awq_scale_groups(arch, stack, block):
    """Layers with experts stand behind dense ones, and may have shared experts beside."""
    if arch is not COHERE2_MOE or not hasattr(block.mlp, "experts"):
        return None
    shared = "mlp.shared_experts" if hasattr(block.mlp, "shared_experts") else None
    norm, *up_to_down = presets.moe_mlp(shared=shared)
    one = ScaleGroup(prev="input_layernorm", layers=(*QKV, *norm.layers), compensate=norm.compensate, no_clip=QKV[:2])
    return (one, V_TO_O, *up_to_down)
