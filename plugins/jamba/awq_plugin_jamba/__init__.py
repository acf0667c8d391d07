"""Jamba and Bamba: stacks in which most blocks have a Mamba mixer where the others have attention.

    attention blocks   input_layernorm -> q, k, v      v -> o
    Mamba blocks       input_layernorm -> in_proj      what out_proj reads has been through SiLU
    every block        pre_ff_layernorm -> gate, up    up -> down      a mixture of experts in every other Jamba block

Every group is optional and each block takes those it has. Bamba's mixer (Mamba 2) ends in a gated norm, which feeds
`out_proj`: a group. Jamba's (Mamba 1) does not. It also computes with the weight of `dt_proj` without calling it, so
that linear stays as it is.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
MIXERS = (
    *(replace(group, optional=True) for group in presets.attention()),
    ScaleGroup(prev="input_layernorm", layers=("mamba.in_proj",), optional=True),
)
FUSED = (*presets.fused_attention(), *presets.fused_mlp("feed_forward"))
DENSE = presets.gated_mlp("pre_ff_layernorm", mlp="feed_forward", optional=True)

JAMBA = Architecture(
    family="jamba",
    model_types=("jamba",),
    stacks=(LANGUAGE,),
    scale_groups=(
        *MIXERS,
        *DENSE,
        *presets.moe_mlp(
            "pre_ff_layernorm", experts="feed_forward.experts", router="feed_forward.router", optional=True
        ),
    ),
    fused=FUSED,
    exempt=("mamba.x_proj", "mamba.out_proj"),  # read SiLU's output, and the scan of it
    keep=("mamba.dt_proj",),
)
BAMBA = Architecture(
    family="jamba",
    model_types=("bamba",),
    stacks=(LANGUAGE,),
    scale_groups=(*MIXERS, ScaleGroup(prev="mamba.norm", layers=("mamba.out_proj",), optional=True), *DENSE),
    fused=FUSED,
)


@hookimpl
def awq_architectures():
    return (JAMBA, BAMBA)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not JAMBA:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "feed_forward.experts")
