"""InternLM 2 and 2.5 (their own code), InternLM 3, and InternVL on whatever language model it carries.

    attention_norm -> wqkv    its value rows -> wo    ffn_norm -> w1 (gate), w3 (up)    w3 -> w2 (down)

InternLM 2's `wqkv` goes key-value head by key-value head: the query heads that share it, its key, its value. The
values are the last `head_dim` rows of each part, not of the whole. The MLP is w2( act(w1 x) · w3 x ): w3, not w1, is
what the scales of w2 fold into.

InternLM 3 is Llama by another name. InternVL's language groups come from the plugin that owns its text model.
"""

from awq_core.hooks import Architecture, FusedBlock, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
QKV = "attention.wqkv"

INTERNLM2 = Architecture(
    family="internlm",
    model_types=("internlm2",),
    stacks=(LANGUAGE,),
    scale_groups=(
        ScaleGroup(prev="attention_norm", layers=(QKV,), no_clip=(QKV,)),
        ScaleGroup(prev=QKV, layers=("attention.wo",), prev_rows="heads", head_dim="attention.head_dim"),
        ScaleGroup(prev="ffn_norm", layers=("feed_forward.w1", "feed_forward.w3")),
        ScaleGroup(prev="feed_forward.w3", layers=("feed_forward.w2",)),
    ),
    fused=(
        FusedBlock(
            match="feed_forward",
            parts=("w1", "w3"),
            factory="awq_core.modules.merged:merge_products",
            name="gate-up",
        ),
    ),
)
INTERNLM3 = Architecture(
    family="internlm",
    model_types=("internlm3",),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)
INTERNVL = Architecture(
    family="internlm",
    model_types=("internvl",),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_tower.encoder.layer"),
        LayerStack(component="projector", blocks="model.multi_modal_projector"),
        LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config"),
    ),
    components=presets.LANGUAGE_ALONE,
)


@hookimpl
def awq_architectures():
    return (INTERNLM2, INTERNLM3, INTERNVL)
