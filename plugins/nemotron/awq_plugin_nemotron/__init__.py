"""Nemotron and Minitron: attention, then a two-layer MLP with the square of ReLU between.

input_layernorm -> q, k, v     v -> o     post_attention_layernorm -> up     up -> down

relu(x / t)² = relu(x)² / t², so `up` is divided by √s for `down` to be multiplied by s (`degree=2`). The norms are
LayerNorms that multiply by 1 + weight and have a bias.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

NEMOTRON = Architecture(
    family="nemotron",
    model_types=("nemotron",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(
        *presets.attention(norm_offset=1.0),
        ScaleGroup(prev="post_attention_layernorm", layers=("mlp.up_proj",), norm_offset=1.0),
        ScaleGroup(prev="mlp.up_proj", layers=("mlp.down_proj",), degree=2),
    ),
    fused=presets.fused_attention(),
)


@hookimpl
def awq_architectures():
    return (NEMOTRON,)
