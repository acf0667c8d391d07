"""Baidu's ERNIE 4.5, dense and mixture of experts.

Llama's block. In a mixture, dense layers stand before, between or behind the layers with experts; some models have
shared experts. The router corrects its choice by a bias added behind a softmax, so its weight alone is multiplied by
the scales.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")

DENSE = Architecture(
    family="ernie",
    model_types=("ernie4_5",),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)
MIXTURE = Architecture(
    family="ernie",
    model_types=("ernie4_5_moe",),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)


@hookimpl
def awq_architectures():
    return (DENSE, MIXTURE)


@hookimpl
def awq_scale_groups(arch, block):
    """Of a mixture, the layers with experts; with shared ones, where the block has them."""
    if arch is not MIXTURE or not hasattr(block.mlp, "experts"):
        return None
    shared = "mlp.shared_experts" if block.mlp.shared_experts is not None else None
    return (*presets.attention(), *presets.moe_mlp(shared=shared))


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not MIXTURE:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")
