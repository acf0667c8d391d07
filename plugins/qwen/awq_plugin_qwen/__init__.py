"""Qwen 2, 2.5 and 3: dense, mixture-of-experts and vision-language.

The dense block is Llama's. Mixture layers may stand beside dense ones (`decoder_sparse_step`), so both sets of groups
are optional and each block takes those it has. Every reader of the second norm is compensated: the router and, in
Qwen2-MoE, the gate of the shared expert.
"""

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
VISION_LANGUAGE = (
    LayerStack(component="vision", blocks="model.visual.blocks"),
    LayerStack(component="projector", blocks="model.visual.merger"),
    LayerStack(component="language", blocks="model.language_model.layers"),
)
POLICIES = (
    ComponentPolicy(component="language", action="quantize"),
    ComponentPolicy(component="vision", action="keep", reason="a few percent of the weights, and sensitive"),
    ComponentPolicy(component="projector", action="keep", reason="every image token passes through it"),
)
EITHER_MLP = presets.gated_mlp(optional=True)

DENSE = Architecture(
    family="qwen", model_types=("qwen2", "qwen3"), stacks=(LANGUAGE,), scale_groups=presets.LLAMA_BLOCK
)
QWEN2_MOE = Architecture(
    family="qwen",
    model_types=("qwen2_moe",),
    stacks=(LANGUAGE,),
    scale_groups=(
        *presets.attention(),
        *EITHER_MLP,
        *presets.moe_mlp(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate", optional=True),
    ),
)
QWEN3_MOE = Architecture(
    family="qwen",
    model_types=("qwen3_moe",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention(), *EITHER_MLP, *presets.moe_mlp(optional=True)),
)
VISION = Architecture(
    family="qwen",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    stacks=VISION_LANGUAGE,
    scale_groups=presets.LLAMA_BLOCK,
    components=POLICIES,
)


@hookimpl
def awq_architectures():
    return (DENSE, QWEN2_MOE, QWEN3_MOE, VISION)


@hookimpl
def awq_prepare_model(arch, model):
    if arch not in (QWEN2_MOE, QWEN3_MOE):
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")


@hookimpl
def awq_calibration_batch(arch, processor, sample):
    """A caption beside an image becomes a prompt with the image where Qwen's templates put it."""
    if not sample.get("images") or "text" not in sample:
        return None
    image = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample["images"])
    return processor(text=[image + sample["text"]], images=sample["images"], return_tensors="pt")
