"""GLM 4 and 4.5: dense, mixture-of-experts, vision-language.

    input_layernorm -> q, k, v    v -> o    post_attention_layernorm -> gate_up    its last rows, up -> down

Gate and up are one linear, gate first. The dense GLM-4-0414 and the vision models have two norms more, on what
attention and MLP return (`post_self_attn_layernorm`, `post_mlp_layernorm`): nothing reads those but the residual, and
`post_attention_layernorm` still stands before the MLP.

The mixtures (4.5, 4.6) have gate and up apart, dense first layers and shared experts; norms on query and key take no
part. 4.7 Flash and 5 have multi-head latent attention. In 5 an indexer chooses the tokens that a query attends to; it
reads the block's norm and the query's latent norm, is small, and kept. Models in which layers share a choice are
refused: calibration runs one layer at a time.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
POSITIONS = ("model.visual.embeddings.position_embedding",)  # interpolated, not called
VISION_LANGUAGE = (
    LayerStack(component="vision", blocks="model.visual.blocks", prelude=POSITIONS),
    LayerStack(component="projector", blocks="model.visual.merger", prelude=POSITIONS),
    LayerStack(component="language", blocks="model.language_model.layers", prelude=POSITIONS),
)
FUSED_MLP = (
    ScaleGroup(prev="post_attention_layernorm", layers=("mlp.gate_up_proj",)),
    ScaleGroup(prev="mlp.gate_up_proj", layers=("mlp.down_proj",), prev_rows="last"),
)
EITHER_MLP = (*presets.gated_mlp(optional=True), *presets.moe_mlp(shared="mlp.shared_experts", optional=True))
DENSE_BLOCK = (*presets.attention(), *FUSED_MLP)
MIXTURE_BLOCK = (*presets.attention(), *EITHER_MLP)

DENSE = Architecture(
    family="glm",
    model_types=("glm", "glm4"),
    stacks=(LANGUAGE,),
    scale_groups=DENSE_BLOCK,
    fused=presets.fused_attention(),
)
MIXTURE = Architecture(
    family="glm",
    model_types=("glm4_moe",),
    stacks=(LANGUAGE,),
    scale_groups=MIXTURE_BLOCK,
    fused=presets.FUSED_BLOCK,
)
LATENT = Architecture(
    family="glm",
    model_types=("glm4_moe_lite",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.latent_attention(), *EITHER_MLP),
    fused=(*presets.fused_mlp(), *presets.fused_mlp("mlp.shared_experts"), *presets.fused_norms()),
)
VISION = Architecture(
    family="glm",
    model_types=("glm4v",),
    stacks=VISION_LANGUAGE,
    scale_groups=DENSE_BLOCK,
    components=presets.LANGUAGE_ALONE,
    fused=presets.fused_attention(),
)
VISION_MIXTURE = Architecture(
    family="glm",
    model_types=("glm4v_moe",),
    stacks=VISION_LANGUAGE,
    scale_groups=MIXTURE_BLOCK,
    components=presets.LANGUAGE_ALONE,
    fused=presets.FUSED_BLOCK,
)
INDEXER = {
    "input_layernorm": ("self_attn.indexer.wk", "self_attn.indexer.weights_proj"),
    "self_attn.q_a_layernorm": ("self_attn.indexer.wq_b",),
}
INDEXED = Architecture(
    family="glm",
    model_types=("glm_moe_dsa",),
    stacks=(LANGUAGE,),
    scale_groups=tuple(
        replace(group, compensate=group.compensate + INDEXER.get(group.prev, ())) for group in LATENT.scale_groups
    ),
    fused=LATENT.fused,
)


@hookimpl
def awq_architectures():
    return (DENSE, MIXTURE, LATENT, INDEXED, VISION, VISION_MIXTURE)


@hookimpl
def awq_prepare_model(arch, model):
    from awq_core.errors import PlanError
    from awq_core.modules import unstack_experts

    if arch is INDEXED and "shared" in model.config.indexer_types:
        raise PlanError(
            "layers of this model share the choice of an indexer", hint="awq-plugin-glm does not read these"
        )
    return unstack_experts(model, "mlp.experts")


@hookimpl
def awq_calibration_batch(arch, processor, sample):
    """A caption beside an image becomes a prompt with the image where GLM's templates put it."""
    if not sample.get("images") or "text" not in sample:
        return None
    image = "<|begin_of_image|><|image|><|end_of_image|>" * len(sample["images"])
    return processor(text=[image + sample["text"]], images=sample["images"], return_tensors="pt")
