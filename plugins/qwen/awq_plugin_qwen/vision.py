"""Qwen with images, and the part of Qwen-Omni that understands and writes text (its "thinker").

A vision tower, a merger of its patches, and one of the text models: their scale groups and fused blocks are the text
model's. Qwen3-VL adds image features after its first blocks as well. Omni's tower for sounds is kept, as the one for
images.
"""

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, presets

STACKS = (
    LayerStack(component="vision", blocks="model.visual.blocks"),
    LayerStack(component="projector", blocks="model.visual.merger"),
    LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config"),
)

VISION = Architecture(
    family="qwen",
    model_types=("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"),
    stacks=STACKS,
    components=presets.LANGUAGE_ALONE,
)
OMNI = Architecture(
    family="qwen",
    model_types=("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"),
    stacks=(LayerStack(component="audio", blocks="model.audio_tower.layers"), *STACKS),
    components=(
        *presets.LANGUAGE_ALONE,
        ComponentPolicy(component="audio", action="keep", reason="a few percent of the weights, and sensitive"),
    ),
)
