"""Qwen 1, which brings its own code.

ln_1 -> c_attn (q, k, v in this order)     its last third, v -> c_proj
ln_2 -> w1 (up), w2 (the gate)             w1 -> c_proj
"""

from awq_core.hooks import Architecture, FusedBlock, LayerStack, ScaleGroup

QWEN1 = Architecture(
    family="qwen",
    model_types=("qwen",),
    stacks=(LayerStack(component="language", blocks="transformer.h"),),
    scale_groups=(
        ScaleGroup(prev="ln_1", layers=("attn.c_attn",), no_clip=("attn.c_attn",)),
        ScaleGroup(prev="attn.c_attn", layers=("attn.c_proj",), prev_rows="last"),
        ScaleGroup(prev="ln_2", layers=("mlp.w1", "mlp.w2")),
        ScaleGroup(prev="mlp.w1", layers=("mlp.c_proj",)),
    ),
    fused=(
        FusedBlock(match="mlp", parts=("w1", "w2"), factory="awq_core.modules.merged:merge_products", name="gate-up"),
    ),
)
