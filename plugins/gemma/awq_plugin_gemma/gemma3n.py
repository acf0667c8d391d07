"""Gemma 3n and 4, whose norms multiply by their weight alone and whose values are normed, head by head, without one.

Gemma 3n leaves little to scale. `input_layernorm` is also added to the residual, in the LAuReL branch, so query, key
and value have no scales; the norm behind value would undo one between value and output; the per-layer inputs are gated
by an activation. AltUp's maps are as wide as it has streams, four, and stay as they are.

Gemma 4 has no LAuReL and no streams, so its input norm has scales. There may be experts beside the MLP, behind a norm
of their own; their router reads the residual through a norm without weight.

In both, layers at the end may take keys and values from those before, and in Gemma 4 one linear may write both.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, ScaleGroup, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
MLP = presets.gated_mlp("pre_feedforward_layernorm")
NORM_TO_EXPERTS, UP_TO_DOWN = presets.moe_mlp("pre_feedforward_layernorm_2", experts="experts")
EXPERTS = (replace(NORM_TO_EXPERTS, compensate=()), UP_TO_DOWN)
FUSED = (*presets.fused_attention(), *presets.fused_mlp())
UNSCALED = (
    "self_attn.o_proj",  # v_norm stands behind v_proj and would undo the scale
    "per_layer_input_gate",  # reads the residual
    "per_layer_projection",  # reads the output of an activation
)

GEMMA3N = Architecture(
    family="gemma",
    model_types=("gemma3n_text",),
    stacks=(LANGUAGE,),
    scale_groups=(*MLP, ScaleGroup(prev="laurel.linear_left", layers=("laurel.linear_right",))),
    fused=FUSED,
    exempt=(*UNSCALED, "laurel.linear_left"),  # the last reads input_layernorm
    keep=("altup.*",),  # a router, and maps between four streams
)
GEMMA4 = Architecture(
    family="gemma",
    model_types=("gemma4_text",),
    stacks=(LANGUAGE,),
    scale_groups=MLP,
    fused=FUSED,
    exempt=UNSCALED,
    keep=("router.proj",),
)
VISION = ComponentPolicy(component="vision", action="keep", reason="a few percent of the weights, and sensitive")
GEMMA4_MULTIMODAL = replace(
    GEMMA4,
    model_types=("gemma4",),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_tower.encoder.layers"),
        LayerStack(component="projector", blocks="model.embed_vision.embedding_projection"),
        LayerStack(component="language", blocks="model.language_model.layers"),
    ),
    components=(
        ComponentPolicy(component="language", action="quantize"),
        VISION,
        replace(VISION, component="projector", reason="every image token passes through it"),
    ),
)


def groups_of(arch, block):
    """Query, key and value as far as a block has them, the MLP, and the experts where there are any."""
    names = (f"{name}_proj" for name in "qkv")
    own = tuple(f"self_attn.{name}" for name in names if getattr(block.self_attn, name, None) is not None)
    readers = ScaleGroup(prev="" if arch is GEMMA3N else "input_layernorm", layers=own, no_clip=own[:2])
    return (readers, *arch.scale_groups, *(EXPERTS if hasattr(block, "experts") else ()))
