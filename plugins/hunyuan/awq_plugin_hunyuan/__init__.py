"""Tencent's Hunyuan, dense (0.5B to 7B) and mixture of experts (A13B).

Llama's block; the norms on query and key stand behind the rotation and take no part. In a mixture each token goes
through its experts and through a shared MLP, and the router's weight is one module deeper, in `mlp.gate.wg`.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")

DENSE = Architecture(
    family="hunyuan",
    model_types=("hunyuan_v1_dense",),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)
MIXTURE = Architecture(
    family="hunyuan",
    model_types=("hunyuan_v1_moe",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention(), *presets.moe_mlp(router="mlp.gate.wg", shared="mlp.shared_mlp")),
    fused=(*presets.fused_attention(), *presets.fused_mlp("mlp.shared_mlp"), *presets.fused_norms()),
)


@hookimpl
def awq_architectures():
    return (DENSE, MIXTURE)


@hookimpl
def awq_prepare_model(arch, model):
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")
