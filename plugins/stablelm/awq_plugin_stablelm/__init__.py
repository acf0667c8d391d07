"""StableLM: Llama's block with LayerNorms (weight and bias), and a form of it with parallel residuals.

    serial      x + attn(ln1 x), then + mlp(ln2 x)
    parallel    x + attn(ln1 x) + mlp(ln1 x)

In the parallel form there is no second norm: the first one feeds gate and up as well, so they join its group. Norms on
query and key (`qk_layernorm`) stand behind the projections and take no part.

`stablelm_epoch` is the same block as the first releases' own code had it.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")

STABLELM = Architecture(
    family="stablelm",
    model_types=("stablelm", "stablelm_epoch"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=(*presets.fused_attention(), *presets.fused_mlp()),
)
ONE_NORM = ScaleGroup(prev="input_layernorm", layers=(*QKV, *MLP), no_clip=QKV[:2])
PARALLEL = (ONE_NORM, presets.attention()[1], presets.gated_mlp()[1])


@hookimpl
def awq_architectures():
    return (STABLELM,)


@hookimpl
def awq_scale_groups(arch, stack, block):
    return PARALLEL if getattr(block, "post_attention_layernorm", None) is None else arch.scale_groups
