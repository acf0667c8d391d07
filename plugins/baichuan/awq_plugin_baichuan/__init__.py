"""Baichuan 1 and 2, 7B and 13B (their own code).

    input_layernorm -> W_pack    its last third, the values -> o    post_attention_layernorm -> gate, up    up -> down

`W_pack` is query, key and value in one linear, stacked in this order; there are as many key-value heads as query
heads. The 7B rotates query and key, the 13B adds ALiBi to the attention's weights: neither matters to the scales.
Baichuan 2's head divides each of its rows by its size when it is called, so it is kept, as heads are.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

QKV = "self_attn.W_pack"

BAICHUAN = Architecture(
    family="baichuan",
    model_types=("baichuan",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(
        ScaleGroup(prev="input_layernorm", layers=(QKV,), no_clip=(QKV,)),
        ScaleGroup(prev=QKV, layers=("self_attn.o_proj",), prev_rows="last"),
        *presets.gated_mlp(),
    ),
    fused=presets.fused_mlp(),
)


@hookimpl
def awq_architectures():
    return (BAICHUAN,)
