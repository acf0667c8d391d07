"""OLMo 1, 2 and 3, OLMoE and FlexOlmo. Where the norms stand decides what can have scales.

    OLMo      norm without weight -> q, k, v        the format has no place for a scale on an activation
    OLMo 2/3  the residual itself -> q, k, v        norms come after attention and MLP
    OLMoE     norm -> q, k, v                       as in Llama

In the first two, query, key, value, gate and up (or the experts' and the router) have none, and only value -> output
and up -> down are left. OLMo and OLMoE may clamp the values to ±`clip_qkv`. A clamp moves when what it clamps is
divided, so with it value -> output has no scales either. Norms on query and key take no part.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
READ_TO_QKV, V_TO_O = presets.attention()
RESIDUAL_TO_QKV = replace(READ_TO_QKV, prev="")
READ_TO_GATE_UP, UP_TO_DOWN = presets.gated_mlp()
READ_TO_EXPERTS, EXPERT_UP_TO_DOWN = presets.moe_mlp()
FUSED = (*presets.fused_attention(), *presets.fused_mlp())
POST_NORM = (RESIDUAL_TO_QKV, V_TO_O, replace(READ_TO_GATE_UP, prev=""), UP_TO_DOWN)

OLMO = Architecture(
    family="olmo",
    model_types=("olmo",),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=FUSED,
    exempt=("self_attn.o_proj",),  # where the values are clamped
)
OLMO2 = Architecture(
    family="olmo", model_types=("olmo2", "olmo3"), stacks=(LANGUAGE,), scale_groups=POST_NORM, fused=FUSED
)
OLMOE = Architecture(
    family="olmo",
    model_types=("olmoe",),
    stacks=(LANGUAGE,),
    scale_groups=(READ_TO_QKV, V_TO_O, READ_TO_EXPERTS, EXPERT_UP_TO_DOWN),
    fused=presets.fused_attention(),
    exempt=("self_attn.o_proj",),  # where the values are clamped
)
FLEX_OLMO = Architecture(
    family="olmo",
    model_types=("flex_olmo",),
    stacks=(LANGUAGE,),
    scale_groups=(RESIDUAL_TO_QKV, V_TO_O, replace(READ_TO_EXPERTS, prev="", compensate=()), EXPERT_UP_TO_DOWN),
    fused=presets.fused_attention(),
)


@hookimpl
def awq_architectures():
    return (OLMO, OLMO2, OLMOE, FLEX_OLMO)


@hookimpl
def awq_scale_groups(arch, stack, block):
    if getattr(block.self_attn.config, "clip_qkv", None) is None:
        return None
    return tuple(group for group in arch.scale_groups if group != V_TO_O)


@hookimpl
def awq_prepare_model(arch, model):
    if arch not in (OLMOE, FLEX_OLMO):
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")
