"""Idefics 2 and 3 and SmolVLM: a SigLIP-like tower, a connector, and somebody else's language model.

The scale groups of the language blocks come from the plugin that owns the text model: Mistral in Idefics 2, Llama in
Idefics 3 and SmolVLM. The connector is one block: in Idefics 2 a gated MLP and a perceiver, whose latents read the
patches; in the others one linear, which reads neighbouring patches joined into one.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

IDEFICS = Architecture(
    family="idefics",
    model_types=("idefics2", "idefics3", "smolvlm"),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_model.encoder.layers"),
        LayerStack(component="projector", blocks="model.connector"),
        LayerStack(
            component="language",
            blocks="model.text_model.layers",
            groups_from="text_config",
            # Idefics 3 asks its first parameter, which is this module's, what device it is on.
            prelude=("model.vision_model.embeddings.patch_embedding",),
        ),
    ),
    components=presets.LANGUAGE_ALONE,
)


@hookimpl
def awq_architectures():
    return (IDEFICS,)
