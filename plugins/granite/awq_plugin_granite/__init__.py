"""IBM's Granite: dense, mixtures of experts, and the hybrids of version 4 with Mamba-2 blocks.

The dense block is Llama's; the multipliers on embeddings, attention, residuals and logits are constants, which scales
pass through. The other blocks are put together from these parts:

    input_layernorm -> q, k, v    v -> o            or    input_layernorm -> mamba.in_proj    mamba.norm -> out_proj
    post_attention_layernorm -> the router (compensated), every expert's gate and up, the shared MLP

The shared MLP fuses gate and up in one linear, gate first, so its last rows feed the next. A checkpoint stacks the
experts of a layer in two tensors; they are taken apart as Mixtral's, which is how engines read them: w1 (gate), w3 (up)
and w2 (down).
"""

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
MOE, SHARED = "block_sparse_moe", "shared_mlp"

GRANITE = Architecture(
    family="granite",
    model_types=("granite", "granite_swa"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=(*presets.fused_attention(), *presets.fused_mlp()),
)
ATTENTION = presets.attention()
MAMBA = (
    ScaleGroup(prev="input_layernorm", layers=("mamba.in_proj",)),
    ScaleGroup(prev="mamba.norm", layers=("mamba.out_proj",)),
)
DENSE = ScaleGroup(prev="post_attention_layernorm", layers=(f"{SHARED}.input_linear",))
UP_TO_OUTPUT = ScaleGroup(prev=f"{SHARED}.input_linear", layers=(f"{SHARED}.output_linear",), prev_rows="last")
EXPERTS, UP_TO_DOWN = presets.moe_mlp(experts=f"{MOE}.experts", gate="w1", up="w3", down="w2", router=f"{MOE}.router")
BOTH = ScaleGroup(prev=EXPERTS.prev, layers=(*EXPERTS.layers, *DENSE.layers), compensate=EXPERTS.compensate)

MIXTURE = Architecture(
    family="granite",
    model_types=("granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"),
    stacks=(LANGUAGE,),
    scale_groups=(*ATTENTION, EXPERTS, UP_TO_DOWN),
    fused=presets.fused_attention(),
)


@hookimpl
def awq_architectures():
    return (GRANITE, MIXTURE)


@hookimpl
def awq_scale_groups(arch, stack, block):
    """Which parts a block of the mixtures and hybrids has."""
    if arch is not MIXTURE:
        return None
    mixer = ATTENTION if getattr(block, "mamba", None) is None else MAMBA
    experts, shared = (getattr(block, name, None) is not None for name in (MOE, SHARED))
    if not experts:
        return (*mixer, DENSE, UP_TO_OUTPUT)
    return (*mixer, *((BOTH, UP_TO_OUTPUT) if shared else (EXPERTS,)), UP_TO_DOWN)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not MIXTURE:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, f"{MOE}.experts", ("w1", "w3", "w2"))
