"""The GPT family: GPT-2, GPT-Neo, GPT-J, GPT-NeoX (Pythia), GPT-BigCode (StarCoder), StarCoder 2.

Attention, then a two-layer MLP with GELU between, each behind a LayerNorm; `norm -> q, k, v`, `v -> out` and
`norm -> first` are groups. The MLP's second linear reads GELU's output, which no scale passes through. What differs:

    GPT-2          weights are [in, out] on disk (`Conv1D`); q, k and v are one linear, stacked in this order
    GPT-BigCode    the same names, ordinary linears; one key-value head behind the queries, or q, k, v head by head
    GPT-NeoX       q, k, v head by head; side by side or serial, attention and MLP have a norm each
    GPT-J          attention and MLP side by side on one norm
    CodeGen        as GPT-J, with q, v and k fused in four parts, for the four chips it was trained on

gpt-oss is a mixture of experts with grouped-query attention and biases throughout. Its experts compute
down((up + 1) · gate · σ(α · gate)), both clamped before: no scale passes through that, so `down` has no group.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

BLOCKS = LayerStack(component="language", blocks="transformer.h")
FUSED = (
    ScaleGroup(prev="ln_1", layers=("attn.c_attn",), no_clip=("attn.c_attn",)),
    ScaleGroup(prev="ln_2", layers=("mlp.c_fc",)),
)

GPT2 = Architecture(
    family="gpt",
    model_types=("gpt2",),
    stacks=(BLOCKS,),
    scale_groups=(*FUSED, ScaleGroup(prev="attn.c_attn", layers=("attn.c_proj",), prev_rows="last")),
    exempt=("mlp.c_proj",),  # reads GELU's output
)
BIGCODE = Architecture(
    family="gpt",
    model_types=("gpt_bigcode",),
    stacks=(BLOCKS,),
    scale_groups=(
        *FUSED,
        ScaleGroup(prev="attn.c_attn", layers=("attn.c_proj",), prev_rows="heads", head_dim="attn.head_dim"),
    ),
    exempt=("mlp.c_proj",),  # reads GELU's output
)
NEO = Architecture(
    family="gpt",
    model_types=("gpt_neo",),
    stacks=(BLOCKS,),
    scale_groups=(
        *presets.attention("ln_1", attn="attn.attention", out="out_proj"),
        ScaleGroup(prev="ln_2", layers=("mlp.c_fc",)),
    ),
    fused=presets.fused_attention("attn.attention"),
    exempt=("mlp.c_proj",),  # reads GELU's output
)
Q, K, V = (f"attn.{name}_proj" for name in "qkv")
GPTJ = Architecture(
    family="gpt",
    model_types=("gptj",),
    stacks=(BLOCKS,),
    scale_groups=(
        ScaleGroup(prev="ln_1", layers=(Q, K, V, "mlp.fc_in"), no_clip=(Q, K)),
        ScaleGroup(prev=V, layers=("attn.out_proj",)),
    ),
    fused=presets.fused_attention("attn"),
    exempt=("mlp.fc_out",),  # reads GELU's output
)
CODEGEN = Architecture(
    family="gpt",
    model_types=("codegen",),
    stacks=(BLOCKS,),
    scale_groups=(ScaleGroup(prev="ln_1", layers=("attn.qkv_proj", "mlp.fc_in"), no_clip=("attn.qkv_proj",)),),
    exempt=(
        "mlp.fc_out",  # reads GELU's output
        "attn.out_proj",  # reads values that are the middle rows of each part, which no group can name
    ),
)
QKV = "attention.query_key_value"
NEOX = Architecture(
    family="gpt",
    model_types=("gpt_neox",),
    stacks=(LayerStack(component="language", blocks="gpt_neox.layers"),),
    scale_groups=(
        ScaleGroup(prev="input_layernorm", layers=(QKV,), no_clip=(QKV,)),
        ScaleGroup(prev=QKV, layers=("attention.dense",), prev_rows="heads", head_dim="attention.head_size"),
        ScaleGroup(prev="post_attention_layernorm", layers=("mlp.dense_h_to_4h",)),
    ),
    exempt=("mlp.dense_4h_to_h",),  # reads GELU's output
)
NEOX_JAPANESE = replace(
    NEOX,
    model_types=("gpt_neox_japanese",),
    stacks=(LayerStack(component="language", blocks="gpt_neox_japanese.layers"),),
)
STARCODER2 = Architecture(
    family="gpt",
    model_types=("starcoder2",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(*presets.attention(), ScaleGroup(prev="post_attention_layernorm", layers=("mlp.c_fc",))),
    fused=presets.fused_attention(),
    exempt=("mlp.c_proj",),  # reads GELU's output
)
OSS = Architecture(
    family="gpt",
    model_types=("gpt_oss",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=(*presets.attention(), presets.moe_mlp(router="mlp.router")[0]),
    fused=presets.fused_attention(),
    exempt=("mlp.experts.*.down_proj",),  # reads what the clamps and up + 1 give
)


@hookimpl
def awq_architectures():
    return (GPT2, BIGCODE, NEO, GPTJ, CODEGEN, NEOX, NEOX_JAPANESE, STARCODER2, OSS)


@hookimpl
def awq_prepare_model(arch, model):
    if arch not in (GPT2, OSS):
        return None
    from awq_core.modules import linear_conv1d, unstack_experts

    return linear_conv1d(model) if arch is GPT2 else unstack_experts(model, "mlp.experts")
