"""Mistral, Ministral and Mixtral. The dense models have Llama's block; Mixtral routes each token to two experts.

transformers 5 holds Mixtral's experts in stacked 3-D parameters; the checkpoint has one linear each, `w1` (gate), `w3`
(up) and `w2` (down). The router reads the same norm as the experts, so it is multiplied by the same scales.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
EXPERT_NAMES = ("w1", "w3", "w2")

DENSE = Architecture(
    family="mistral",
    model_types=("mistral", "ministral", "ministral3"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
)

MIXTRAL = Architecture(
    family="mistral",
    model_types=("mixtral",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention(), *presets.moe_mlp(gate="w1", up="w3", down="w2", router="mlp.gate")),
)


@hookimpl
def awq_architectures():
    return (DENSE, MIXTRAL)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not MIXTRAL:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts", EXPERT_NAMES)
