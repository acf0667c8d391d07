"""MPT: attention with ALiBi, then a two-layer MLP with GELU between; no biases anywhere.

norm_1 -> Wqkv     Wqkv -> out_proj     norm_2 -> up_proj

`Wqkv` is query, key and value in this order. Some models clamp what it writes (`clip_qkv`), and a clamp does not pass
a scale on: then the second group goes.
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl

NORMS = (
    ScaleGroup(prev="norm_1", layers=("attn.Wqkv",), no_clip=("attn.Wqkv",)),
    ScaleGroup(prev="norm_2", layers=("ffn.up_proj",)),
)
VALUES = ScaleGroup(prev="attn.Wqkv", layers=("attn.out_proj",), prev_rows="last")

MPT = Architecture(
    family="mpt",
    model_types=("mpt",),
    stacks=(LayerStack(component="language", blocks="transformer.blocks"),),
    scale_groups=(*NORMS, VALUES),
    exempt=(
        "ffn.down_proj",  # reads GELU's output, which no scale passes through
        "attn.out_proj",  # where the values are clamped
    ),
)


@hookimpl
def awq_architectures():
    return (MPT,)


@hookimpl
def awq_scale_groups(arch, block):
    return NORMS if block.attn.clip_qkv else None
