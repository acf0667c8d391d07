"""Llama and the families that share its block: SmolLM, Yi and Aquila among them.

input_layernorm -> q, k, v     v -> o     post_attention_layernorm -> gate, up     up -> down
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")

LLAMA = Architecture(
    family="llama",
    model_types=("llama", "smollm3", "aquila"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
)

# Yi's first releases brought their own code, with shorter names for the two norms.
YI = Architecture(
    family="llama",
    model_types=("Yi",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention("ln1"), *presets.gated_mlp("ln2")),
)


@hookimpl
def awq_architectures():
    return (LLAMA, YI)
