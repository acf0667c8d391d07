"""LLaVA, LLaVA-NeXT and LLaVA-OneVision: a vision tower, a projector, and somebody else's language model.

The scale groups of the language blocks come from the plugin that owns the text model (`groups_from`), so LLaVA on
Mistral needs `awq-plugin-mistral` installed beside this one.
"""

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, hookimpl

LANGUAGE = LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config")
PROJECTOR = LayerStack(component="projector", blocks="model.multi_modal_projector")
# CLIP and SigLIP towers keep their blocks in one place, Pixtral's in another.
VISION_PATHS = ("model.vision_tower.encoder.layers", "model.vision_tower.transformer.layers")

LLAVA = Architecture(
    family="llava",
    model_types=("llava", "llava_next", "llava_onevision"),
    stacks=(LayerStack(component="vision", blocks=VISION_PATHS[0]), PROJECTOR, LANGUAGE),
    components=(
        ComponentPolicy(component="language", action="quantize"),
        ComponentPolicy(component="vision", action="keep", reason="a few percent of the weights, and sensitive"),
        ComponentPolicy(component="projector", action="keep", reason="every image token passes through it"),
    ),
)


@hookimpl
def awq_architectures():
    return (LLAVA,)


@hookimpl
def awq_layer_stacks(arch, model):
    names = {name for name, _ in model.named_modules()}
    vision = next((path for path in VISION_PATHS if path in names), VISION_PATHS[0])
    return (LayerStack(component="vision", blocks=vision), PROJECTOR, LANGUAGE)
