"""PaliGemma 1 and 2: SigLIP, one linear as projector, and Gemma 1 or 2, whose plugin brings the scale groups.

The prefix of a prompt, image and text, attends in both directions. No scale depends on who attends to whom, so the
groups are those of the text models, with norms that multiply by 1 + weight.
"""

from dataclasses import replace

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

HEAD = "model.vision_tower.head"  # its attention reads a linear's weight without calling it
PALIGEMMA = Architecture(
    family="paligemma",
    model_types=("paligemma",),
    stacks=(
        LayerStack(component="vision", blocks="model.vision_tower.encoder.layers"),
        LayerStack(component="projector", blocks="model.multi_modal_projector"),
        LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config"),
    ),
    components=presets.LANGUAGE_ALONE,
)


@hookimpl
def awq_architectures():
    return (PALIGEMMA,)


@hookimpl
def awq_layer_stacks(arch, model):
    """A tower may have a pooling head, which the model runs and does not use."""
    if not any(name == HEAD for name, _ in model.named_modules()):
        return None
    return tuple(replace(stack, prelude=(HEAD,)) for stack in arch.stacks)
