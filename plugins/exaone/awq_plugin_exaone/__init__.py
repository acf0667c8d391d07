"""LG's EXAONE: 3 and 3.5 (their own code), 4, and the mixtures (K-EXAONE).

    EXAONE 3     ln_1 -> q, k, v    v -> out    ln_2 -> c_fc_0 (gate), c_fc_1 (up)    c_fc_1 -> c_proj
    EXAONE 4     the residual itself -> q, k, v and -> gate, up    v -> o    up -> down
    K-EXAONE     as Llama, with a mixture of experts behind dense first layers

EXAONE 4's norms come after attention and MLP. Nothing that could be divided stands before query, key, value, gate and
up, so these have no scales. Norms on query and key take no part.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, FusedBlock, LayerStack, ScaleGroup, hookimpl, presets

READ_TO_QKV, V_TO_O = presets.attention()
READ_TO_GATE_UP, UP_TO_DOWN = presets.gated_mlp()

EXAONE3 = Architecture(
    family="exaone",
    model_types=("exaone",),
    stacks=(LayerStack(component="language", blocks="transformer.h"),),
    scale_groups=(
        *presets.attention("ln_1", attn="attn.attention", out="out_proj"),
        ScaleGroup(prev="ln_2", layers=("mlp.c_fc_0", "mlp.c_fc_1")),
        ScaleGroup(prev="mlp.c_fc_1", layers=("mlp.c_proj",)),
    ),
    fused=(
        *presets.fused_attention("attn.attention"),
        FusedBlock(
            match="mlp",
            parts=("c_fc_0", "c_fc_1"),
            factory="awq_core.modules.merged:merge_products",
            name="gate-up",
        ),
    ),
)
EXAONE4 = Architecture(
    family="exaone",
    model_types=("exaone4",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(replace(READ_TO_QKV, prev=""), V_TO_O, replace(READ_TO_GATE_UP, prev=""), UP_TO_DOWN),
    fused=(*presets.fused_attention(), *presets.fused_mlp()),
)
MIXTURE = Architecture(
    family="exaone",
    model_types=("exaone_moe",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(
        *presets.attention(),
        *presets.gated_mlp(optional=True),
        *presets.moe_mlp(shared="mlp.shared_experts", optional=True),
    ),
    fused=presets.FUSED_BLOCK,
)


@hookimpl
def awq_architectures():
    return (EXAONE3, EXAONE4, MIXTURE)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not MIXTURE:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")
