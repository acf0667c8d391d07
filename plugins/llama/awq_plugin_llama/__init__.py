"""Llama and the families that share its block: SmolLM3, Yi and Aquila; and Llama 4, text and vision.

    input_layernorm -> q, k, v     v -> o     post_attention_layernorm -> gate, up     up -> down

Llama 4 has Llama's attention, with norms without weights on query and key and a temperature that depends on the
position; both stand behind the projections and take no part. Dense layers and mixtures alternate. A mixture adds a
shared expert to those chosen, and multiplies their *inputs* by the router's score: see experts.py.

    post_attention_layernorm -> experts' gate and up, the shared expert's, the router          up -> down
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")

LLAMA = Architecture(
    family="llama",
    model_types=("llama", "smollm3", "aquila"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)

# Yi's first releases brought their own code, with shorter names for the two norms.
YI = Architecture(
    family="llama",
    model_types=("Yi",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention("ln1"), *presets.gated_mlp("ln2")),
    fused=(*presets.fused_attention(), *presets.fused_mlp()),
)

# `prelude`: the model asks the embedding's weight for its device before it calls it.
LLAMA4_TEXT = Architecture(
    family="llama",
    model_types=("llama4_text",),
    stacks=(LayerStack(component="language", blocks="model.layers", prelude=("model.embed_tokens",)),),
    scale_groups=(
        *presets.attention(),
        *presets.gated_mlp(mlp="feed_forward", optional=True),
        *presets.moe_mlp(
            experts="feed_forward.experts",
            router="feed_forward.router",
            shared="feed_forward.shared_expert",
            optional=True,
        ),
    ),
    fused=(
        *presets.fused_attention(),
        *presets.fused_mlp("feed_forward"),
        *presets.fused_mlp("feed_forward.shared_expert"),
    ),
)
LLAMA4 = Architecture(
    family="llama",
    model_types=("llama4",),
    stacks=(
        LayerStack(component="vision", blocks="vision_model.model.layers"),
        LayerStack(component="projector", blocks="multi_modal_projector"),
        LayerStack(
            component="language",
            blocks="language_model.model.layers",
            prelude=("language_model.model.embed_tokens",),
            groups_from="text_config",
        ),
    ),
    components=presets.LANGUAGE_ALONE,
)


@hookimpl
def awq_architectures():
    return (LLAMA, YI, LLAMA4_TEXT, LLAMA4)


@hookimpl
def awq_prepare_model(arch, model):
    if arch not in (LLAMA4_TEXT, LLAMA4):
        return None
    from awq_plugin_llama.experts import unstack_scored

    return unstack_scored(model)
