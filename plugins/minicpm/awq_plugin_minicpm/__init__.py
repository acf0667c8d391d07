"""OpenBMB's MiniCPM 1, 2 and 4 (their own code) and MiniCPM 3.

Llama's block; in MiniCPM 3 with multi-head latent attention. The embeddings, what each block adds to the residual, and
the head's input are multiplied by constants (`scale_emb`, `scale_depth`, `dim_model_base`), which scales pass through.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")

MINICPM = Architecture(
    family="minicpm",
    model_types=("minicpm",),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=(*presets.fused_attention(), *presets.fused_mlp()),
)
MINICPM3 = Architecture(
    family="minicpm",
    model_types=("minicpm3",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.latent_attention(), *presets.gated_mlp()),
    fused=presets.fused_mlp(),
)


@hookimpl
def awq_architectures():
    return (MINICPM, MINICPM3)
