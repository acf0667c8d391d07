"""Qwen 2, 2.5 and 3, dense and mixture-of-experts. Qwen 1 is in qwen1.py, Qwen3-Next and 3.5 in hybrid.py, what has
images in vision.py.

The dense block is Llama's. Mixture layers may stand beside dense ones (`decoder_sparse_step`), so both sets of groups
are optional and each block takes those it has. Every reader of the second norm is compensated: the router and, where
there is a shared expert, its gate.
"""

from awq_core.hooks import Architecture, LayerStack, hookimpl, presets
from awq_plugin_qwen.hybrid import HYBRID
from awq_plugin_qwen.qwen1 import QWEN1
from awq_plugin_qwen.vision import OMNI, VISION

LANGUAGE = LayerStack(component="language", blocks="model.layers")
EITHER_MLP = presets.gated_mlp(optional=True)
SHARED = presets.moe_mlp(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate", optional=True)

DENSE = Architecture(
    family="qwen",
    model_types=("qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen2_5_omni_text"),
    stacks=(LANGUAGE,),
    scale_groups=presets.LLAMA_BLOCK,
    fused=presets.FUSED_BLOCK,
)
QWEN2_MOE = Architecture(
    family="qwen",
    model_types=("qwen2_moe",),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention(), *EITHER_MLP, *SHARED),
    fused=(*presets.FUSED_BLOCK, *presets.fused_mlp("mlp.shared_expert")),
)
QWEN3_MOE = Architecture(
    family="qwen",
    model_types=("qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text"),
    stacks=(LANGUAGE,),
    scale_groups=(*presets.attention(), *EITHER_MLP, *presets.moe_mlp(optional=True)),
    fused=presets.FUSED_BLOCK,
)


@hookimpl
def awq_architectures():
    return (QWEN1, DENSE, QWEN2_MOE, QWEN3_MOE, HYBRID, VISION, OMNI)


@hookimpl
def awq_prepare_model(model):
    from awq_core.modules import unstack_experts

    return unstack_experts(model, "mlp.experts")


@hookimpl
def awq_calibration_batch(processor, sample):
    """A caption beside an image becomes a prompt with the image where Qwen's templates put it."""
    if not sample.get("images") or "text" not in sample:
        return None
    image = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample["images"])
    return processor(text=[image + sample["text"]], images=sample["images"], return_tensors="pt")
