"""Falcon, in its three forms, and Falcon-H1.

All three compute attention and a two-layer MLP. What differs is who reads which norm:

    7B, 11B    input_layernorm -> attention and MLP        side by side: one norm feeds both
    40B, 180B  ln_attn -> attention     ln_mlp -> MLP      side by side, a norm each
    RW         input_layernorm -> attention, then post_attention_layernorm -> MLP      one after the other

`query_key_value` goes key-value head by key-value head: its query heads, its key, its value. The values are the last
`head_dim` rows of each part. The 7B has one key-value head, so one part; the RW models have as many as query heads.

Falcon-H1's blocks run attention and a Mamba mixer side by side on one norm, then a gated MLP.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

QKV, UP = "self_attention.query_key_value", "mlp.dense_h_to_4h"

VALUES = ScaleGroup(prev=QKV, layers=("self_attention.dense",), prev_rows="heads", head_dim="self_attention.head_dim")
ONE_NORM = (ScaleGroup(prev="input_layernorm", layers=(QKV, UP), no_clip=(QKV,)), VALUES)
TWO_NORMS = (
    ScaleGroup(prev="ln_attn", layers=(QKV,), no_clip=(QKV,)),
    ScaleGroup(prev="ln_mlp", layers=(UP,)),
    VALUES,
)
SERIAL = (
    ScaleGroup(prev="input_layernorm", layers=(QKV,), no_clip=(QKV,)),
    ScaleGroup(prev="post_attention_layernorm", layers=(UP,)),
    VALUES,
)

FALCON = Architecture(
    family="falcon",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),  # the last two are its first releases, with their own code
    stacks=(LayerStack(component="language", blocks="transformer.h"),),
    scale_groups=ONE_NORM,
    exempt=("mlp.dense_4h_to_h",),  # reads the output of GELU, which no scale passes through
)

Q, K, V = (f"self_attn.{name}_proj" for name in "qkv")
FALCON_H1 = Architecture(
    family="falcon",
    model_types=("falcon_h1",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(
        ScaleGroup(prev="input_layernorm", layers=(Q, K, V, "mamba.in_proj"), no_clip=(Q, K)),
        ScaleGroup(prev=V, layers=("self_attn.o_proj",), head_dim="self_attn.head_dim"),
        # Behind the scan stands a norm in some models only; its gate is a product, which a scale passes through.
        ScaleGroup(prev="mamba.norm", layers=("mamba.out_proj",), optional=True),
        *presets.gated_mlp("pre_ff_layernorm", mlp="feed_forward"),
    ),
    fused=(*presets.fused_attention(), *presets.fused_mlp("feed_forward")),
    exempt=("mamba.out_proj",),  # without that norm it reads the scan, whose inputs have been through SiLU
)


@hookimpl
def awq_architectures():
    return (FALCON, FALCON_H1)


@hookimpl
def awq_scale_groups(arch, block):
    """The norms a block has say which of Falcon's three forms it is."""
    if arch is FALCON and hasattr(block, "ln_mlp"):
        return TWO_NORMS
    if arch is FALCON and hasattr(block, "post_attention_layernorm"):
        return SERIAL
    return None  # as the architecture declares
