"""The LLaVA family: a vision tower, a projector, and somebody else's language model.

The scale groups of the language blocks come from the plugin that owns the text model (`groups_from`), so LLaVA on
Mistral needs `awq-plugin-mistral` installed beside this one. LLaVA-NeXT-Video and LLaVA-OneVision send frames through
the tower for images; Video-LLaVA has two, the one for frames is a component of its own, "video".
"""

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config")
PROJECTOR = LayerStack(component="projector", blocks="model.multi_modal_projector")
# CLIP and SigLIP towers keep their blocks in one place, Pixtral's in another.
VISION_PATHS = ("model.vision_tower.encoder.layers", "model.vision_tower.transformer.layers")
HEAD = "model.vision_tower.head"  # SigLIP's: its attention reads a weight without calling it

LLAVA = Architecture(
    family="llava",
    model_types=("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava"),
    stacks=(LayerStack(component="vision", blocks=VISION_PATHS[0]), PROJECTOR, LANGUAGE),
    components=presets.LANGUAGE_ALONE,
)
VIDEO_LLAVA = Architecture(
    family="llava",
    model_types=("video_llava",),
    stacks=(
        LayerStack(component="vision", blocks="model.image_tower.encoder.layers"),
        LayerStack(component="video", blocks="model.video_tower.encoder.layers"),
        PROJECTOR,
        LANGUAGE,
    ),
    components=(
        *presets.LANGUAGE_ALONE,
        ComponentPolicy(component="video", action="keep", reason="a few percent of the weights, and sensitive"),
    ),
)


@hookimpl
def awq_architectures():
    return (LLAVA, VIDEO_LLAVA)


@hookimpl
def awq_layer_stacks(arch, model):
    if arch is VIDEO_LLAVA:
        return None
    names = {name for name, _ in model.named_modules()}
    vision = next((path for path in VISION_PATHS if path in names), VISION_PATHS[0])
    prelude = (HEAD,) if HEAD in names else ()
    return (LayerStack(component="vision", blocks=vision, prelude=prelude), PROJECTOR, LANGUAGE)
