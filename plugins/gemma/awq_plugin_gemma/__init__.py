"""Gemma 1, 2 and 3, Gemma 3 with vision, VaultGemma and RecurrentGemma; Gemma 3n and 4 are in gemma3n.py.

The block is Llama's with norms that multiply by 1 + weight (`norm_offset`). From Gemma 2 on `pre_feedforward_layernorm`
is what gate and up read; the norms behind attention and MLP, and Gemma 3's on query and key, read what no scale
reaches. RecurrentGemma has a recurrence or attention in each block, under one name.
"""

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, ScaleGroup, hookimpl, presets
from awq_plugin_gemma.gemma3n import GEMMA3N, GEMMA4, GEMMA4_MULTIMODAL, LANGUAGE, groups_of

BLOCK = (*presets.attention(norm_offset=1.0), *presets.gated_mlp(norm_offset=1.0))
FUSED = (*presets.fused_attention(), *presets.fused_mlp())
FOUR_NORMS = (*presets.attention(norm_offset=1.0), *presets.gated_mlp("pre_feedforward_layernorm", norm_offset=1.0))

GEMMA = Architecture(family="gemma", model_types=("gemma",), stacks=(LANGUAGE,), scale_groups=BLOCK, fused=FUSED)
GEMMA2 = Architecture(
    family="gemma",
    model_types=("gemma2", "gemma3_text", "vaultgemma"),
    stacks=(LANGUAGE,),
    scale_groups=FOUR_NORMS,
    fused=FUSED,
)
GEMMA3 = Architecture(
    family="gemma",
    model_types=("gemma3",),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_tower.encoder.layers"),
        LayerStack(
            component="language",
            blocks="model.language_model.layers",
            prelude=("model.vision_tower.head",),  # its attention reads a linear's weight without calling it
        ),
    ),
    scale_groups=FOUR_NORMS,
    components=(
        ComponentPolicy(component="language", action="quantize"),
        ComponentPolicy(component="vision", action="keep", reason="a few percent of the weights, and sensitive"),
    ),
    fused=FUSED,
)
READERS = tuple(f"temporal_block.{name}_proj" for name in "qkv")
RECURRENT = Architecture(
    family="gemma",
    model_types=("recurrent_gemma",),
    stacks=(LANGUAGE,),
    scale_groups=(
        ScaleGroup(
            prev="temporal_pre_norm",
            layers=("temporal_block.linear_x", "temporal_block.linear_y"),
            norm_offset=1.0,
            optional=True,
        ),
        ScaleGroup(prev="temporal_pre_norm", layers=READERS, no_clip=READERS[:2], norm_offset=1.0, optional=True),
        ScaleGroup(
            prev=READERS[2], layers=("temporal_block.o_proj",), head_dim="temporal_block.head_dim", optional=True
        ),
        *presets.gated_mlp("channel_pre_norm", mlp="mlp_block", norm_offset=1.0),
    ),
    fused=presets.fused_mlp("mlp_block"),
    exempt=("temporal_block.linear_out",),  # reads the recurrence times an activation
)


@hookimpl
def awq_architectures():
    return (GEMMA, GEMMA2, GEMMA3, GEMMA3N, GEMMA4, GEMMA4_MULTIMODAL, RECURRENT)


@hookimpl
def awq_scale_groups(arch, stack, block):
    if arch not in (GEMMA3N, GEMMA4, GEMMA4_MULTIMODAL) or stack.component != "language":
        return None
    return groups_of(arch, block)


@hookimpl
def awq_layer_stacks(arch, model):
    """Gemma 4 comes with and without a vision tower."""
    names = {name for name, _ in model.named_modules()}
    return [stack for stack in arch.stacks if stack.component == "language" or stack.blocks in names]


@hookimpl
def awq_prepare_model(arch, model):
    if arch not in (GEMMA4, GEMMA4_MULTIMODAL):
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "experts")
