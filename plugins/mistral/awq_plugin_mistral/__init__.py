"""Mistral, Ministral, Mixtral, Mistral 4, and Mistral 3 with images.

The dense models have Llama's block; a temperature on the queries (Ministral 3) stands behind the projections. Mixtral
routes each token to two experts. transformers 5 holds them in stacked 3-D parameters; the checkpoint has one linear
each, `w1` (gate), `w3` (up) and `w2` (down). The router reads the same norm as the experts, so it is multiplied by the
same scales.

Mistral 4 is a mixture with shared experts behind multi-head latent attention:

    input_layernorm -> q_a, kv_a     q_a_layernorm -> q_b     kv_a_layernorm -> kv_b     kv_b -> o

Model type `mistral3` is Pixtral's tower, a projector that merges patches, and whichever text model of these.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")
MIXTRAL_NAMES = ("w1", "w3", "w2")

DENSE = Architecture(
    family="mistral",
    model_types=("mistral", "ministral", "ministral3"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)

MIXTRAL = Architecture(
    family="mistral",
    model_types=("mixtral",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention(), *presets.moe_mlp(gate="w1", up="w3", down="w2", router="mlp.gate")),
    fused=(*presets.fused_attention(), *presets.fused_norms()),
)

MISTRAL4 = Architecture(
    family="mistral",
    model_types=("mistral4",),
    stacks=(LANGUAGE,),
    scale_groups=(
        *presets.latent_attention(),
        *presets.gated_mlp(optional=True),
        *presets.moe_mlp(shared="mlp.shared_experts", optional=True),
    ),
    fused=(*presets.fused_mlp(), *presets.fused_mlp("mlp.shared_experts"), *presets.fused_norms()),
)

MISTRAL3 = Architecture(
    family="mistral",
    model_types=("mistral3",),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_tower.transformer.layers"),
        LayerStack(component="projector", blocks="model.multi_modal_projector"),
        LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config"),
    ),
    components=presets.LANGUAGE_ALONE,
)


@hookimpl
def awq_architectures():
    return (DENSE, MIXTRAL, MISTRAL4, MISTRAL3)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is DENSE:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts", MIXTRAL_NAMES if arch is MIXTRAL else EXPERT_NAMES)
