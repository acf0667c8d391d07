"""OPT and Galactica: attention, then `fc1`, an activation, `fc2`.

self_attn_layer_norm -> q, k, v     v -> out     final_layer_norm -> fc1     fc1 -> fc2

The last is a group because OPT's activation is ReLU: relu(x / s) = relu(x) / s for s > 0. Galactica has GELU there, and
no such group. The 350M model normalises after attention and after the MLP, not before: what its norms write is also the
residual, which no group can scale, so both norms' groups go.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

QKV, VALUES = presets.attention("self_attn_layer_norm", out="out_proj")
FC1 = ScaleGroup(prev="final_layer_norm", layers=("fc1",))
FC2 = ScaleGroup(prev="fc1", layers=("fc2",))

OPT = Architecture(
    family="opt",
    model_types=("opt",),
    stacks=(LayerStack(component="language", blocks="model.decoder.layers"),),
    scale_groups=(QKV, VALUES, FC1, FC2),
    fused=presets.fused_attention(),
    exempt=("self_attn.[qkv]_proj", "fc1", "fc2"),  # where the docstring says that their group goes
)


@hookimpl
def awq_architectures():
    return (OPT,)


@hookimpl
def awq_scale_groups(arch, block):
    before = (QKV, FC1) if block.do_layer_norm_before else ()
    relu = (FC2,) if type(block.activation_fn).__name__ == "ReLU" else ()
    return (*before, VALUES, *relu)
