"""BLOOM: attention with ALiBi, then a two-layer MLP with GELU between.

input_layernorm -> query_key_value     query_key_value -> dense     post_attention_layernorm -> dense_h_to_4h

`query_key_value` goes head by head: query, key, value of the first head, then of the next. The values are the last
`head_dim` rows of each head. A configuration may make the norms' outputs the residual; then their groups go.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl

QKV = "self_attention.query_key_value"
NORMS = (
    ScaleGroup(prev="input_layernorm", layers=(QKV,), no_clip=(QKV,)),
    ScaleGroup(prev="post_attention_layernorm", layers=("mlp.dense_h_to_4h",)),
)
VALUES = ScaleGroup(prev=QKV, layers=("self_attention.dense",), prev_rows="heads", head_dim="self_attention.head_dim")

BLOOM = Architecture(
    family="bloom",
    model_types=("bloom",),
    stacks=(LayerStack(component="language", blocks="transformer.h"),),
    scale_groups=(*NORMS, VALUES),
    exempt=(
        "mlp.dense_4h_to_h",  # reads GELU's output, which no scale passes through
        *(QKV, "mlp.dense_h_to_4h"),  # read a norm that is also the residual, in some configurations
    ),
)


@hookimpl
def awq_architectures():
    return (BLOOM,)


@hookimpl
def awq_scale_groups(arch, block):
    return (VALUES,) if block.apply_residual_connection_post_layernorm else None
