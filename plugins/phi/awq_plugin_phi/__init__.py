"""Phi 1 to 4, Phi-3.5-MoE and Phi-4-multimodal.

Phi (1, 1.5, 2): one norm feeds query, key, value and the MLP's first linear, side by side. The MLP is fc2(gelu(fc1 x)):
GELU cannot pass a scale on, so fc2 is rounded without one.

Phi-3 (Phi-4 has its type) fuses query, key and value in one linear and gate and up in another:

    qkv_proj rows: query | key | value          gate_up_proj rows: gate | up

Of both only the last rows feed the next linear (`prev_rows`). Under grouped-query attention these are fewer than the
output projection reads, and `head_dim` says how they repeat. Phi-4-multimodal is Phi-3 with an image and a speech
encoder, whose results stand in the place of embeddings.

Phi-3.5-MoE has separate linears, LayerNorms with biases, and experts `w1` (gate), `w3` (up), `w2` (down), chosen by a
router that reads what they read.
"""

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, ScaleGroup, hookimpl, presets

LANGUAGE = LayerStack(component="language", blocks="model.layers")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

PHI = Architecture(
    family="phi",
    model_types=("phi",),
    stacks=(LANGUAGE,),
    scale_groups=(
        ScaleGroup(prev="input_layernorm", layers=(*QKV, "mlp.fc1"), no_clip=QKV[:2]),
        ScaleGroup(prev=QKV[2], layers=("self_attn.dense",), head_dim="self_attn.head_dim"),
    ),
    fused=presets.fused_attention(),
    exempt=("mlp.fc2",),  # reads the output of GELU
)
FUSED = (
    ScaleGroup(prev="input_layernorm", layers=("self_attn.qkv_proj",), no_clip=("self_attn.qkv_proj",)),
    ScaleGroup(
        prev="self_attn.qkv_proj", layers=("self_attn.o_proj",), prev_rows="last", head_dim="self_attn.head_dim"
    ),
    ScaleGroup(prev="post_attention_layernorm", layers=("mlp.gate_up_proj",)),
    ScaleGroup(prev="mlp.gate_up_proj", layers=("mlp.down_proj",), prev_rows="last"),
)
PHI3 = Architecture(family="phi", model_types=("phi3",), stacks=(LANGUAGE,), scale_groups=FUSED)

EXTEND = "model.embed_tokens_extend"
# The encoders read a bias of these, to know its device, before they call them; the head's weights never by a call.
EARLY = ("image_embed.img_projection_up", "image_embed.img_processor.head", "audio_embed.up_proj_for_speech")
ENCODERS = tuple(f"{EXTEND}.{path}" for path in (*EARLY, "audio_embed.up_proj_for_vision_speech"))
PHI4_MULTIMODAL = Architecture(
    family="phi",
    model_types=("phi4_multimodal",),
    stacks=(
        LayerStack(component="vision", blocks=f"{EXTEND}.image_embed.img_processor.encoder.layers", prelude=ENCODERS),
        LayerStack(component="audio", blocks=f"{EXTEND}.audio_embed.encoder.encoders", prelude=ENCODERS),
        LayerStack(component="language", blocks="model.layers", prelude=ENCODERS),
    ),
    scale_groups=FUSED,
    components=(
        ComponentPolicy(component="language", action="quantize"),
        ComponentPolicy(component="vision", action="keep", reason="a few percent of the weights, and sensitive"),
        ComponentPolicy(component="audio", action="keep", reason="a few percent of the weights, and sensitive"),
    ),
)
PHIMOE = Architecture(
    family="phi",
    model_types=("phimoe",),
    stacks=(LANGUAGE,),
    scale_groups=(
        *presets.attention(),
        *presets.moe_mlp(gate="w1", up="w3", down="w2", router="mlp.router"),
    ),
    fused=presets.fused_attention(),
)


@hookimpl
def awq_architectures():
    return (PHI, PHI3, PHI4_MULTIMODAL, PHIMOE)


@hookimpl
def awq_prepare_model(arch, model):
    if arch is not PHIMOE:
        return None
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts", ("w1", "w3", "w2"))
