"""GLM: fused gate and up, norms behind attention and MLP, mixtures behind dense layers, latent attention, vision."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    Glm4Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    Glm4vConfig,
    Glm4vImageProcessorPil,
    Glm4vMoeConfig,
    GlmConfig,
    GlmMoeDsaConfig,
)

from awq_core import api
from awq_core.config import QuantConfig
from awq_core.errors import PlanError
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance, noise_image, save_tiny, tiny_tokenizer

MIXTURE = {
    **TINY,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], "partial_rotary_factor": 1.0}
# Ids of the placeholders in the kit's tiny tokenizer.
IMAGES = {"image_token_id": 3, "image_start_token_id": 4, "image_end_token_id": 5, "video_token_id": 6}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "image_size": 16,
}


def glm4v(**options):
    return Glm4vConfig(text_config={**TINY, "rope_parameters": MROPE}, vision_config=VISION, **IMAGES, **options)


def glm4v_moe():
    return Glm4vMoeConfig(text_config={**MIXTURE, "rope_parameters": MROPE}, vision_config=VISION, **IMAGES)


def glm5(**options):
    sparse = {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2}
    return GlmMoeDsaConfig(**{**MIXTURE, **LATENT, **sparse, **options})


class TestGlm(ArchitectureConformance):
    plugin = "awq_plugin_glm"

    @staticmethod
    def configs():
        return {
            "glm": GlmConfig(**TINY, head_dim=16),
            "glm4": Glm4Config(**TINY, head_dim=16, attention_bias=True),
            "glm4-multi-head-tied": Glm4Config(
                **{**TINY, "num_key_value_heads": 4}, head_dim=16, attention_bias=False, tie_word_embeddings=True
            ),
            "glm4_moe": Glm4MoeConfig(**MIXTURE, use_qk_norm=True, attention_bias=True),
            "glm4_moe_lite": Glm4MoeLiteConfig(**{**MIXTURE, **LATENT}),
            "glm_moe_dsa": glm5(),
            "glm4v": glm4v(),
            "glm4v_moe": glm4v_moe(),
        }


def changed(config, change):
    """The proof's error with `change` made to each group."""
    owner = default_manager().owner(config)
    arch = replace(owner.arch, scale_groups=tuple(change(group) for group in owner.arch.scale_groups))
    return prove(config, replace(owner, arch=arch), default_manager()).error


def test_the_norm_on_what_attention_returns_does_not_feed_the_mlp():
    def change(group):
        return replace(group, prev="post_self_attn_layernorm") if "mlp.gate_up_proj" in group.layers else group

    assert changed(Glm4Config(**TINY, head_dim=16), change) > 0.1


def test_the_router_is_compensated():
    assert changed(Glm4MoeConfig(**MIXTURE), lambda group: replace(group, compensate=())) > 0.05


def test_layers_that_share_a_choice_are_refused():
    config = glm5(num_hidden_layers=3, indexer_types=["full", "shared", "full"])
    manager = default_manager()
    with pytest.raises(PlanError, match="share the choice"):
        prove(config, manager.owner(config), manager)


class Processor:
    """GLM's image preprocessing and placeholder expansion, with the tiny tokenizer's own names for the placeholders.
    transformers' processor class also wants torchvision, for videos, and cannot be built without it."""

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.images = Glm4vImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 2048}
        )

    def __call__(self, text, images, return_tensors):
        pixels = self.images(images, return_tensors=return_tensors)
        prompt = text[0].replace("<|begin_of_image|>", "<|vision_start|>").replace("<|end_of_image|>", "<|vision_end|>")
        for grid in pixels["image_grid_thw"]:
            prompt = prompt.replace("<|image|>", "<|image_pad|>" * (int(grid.prod()) // 4), 1)
        tokens = self.tokenizer([prompt], return_tensors=return_tensors)
        kinds = (tokens["input_ids"] == IMAGES["image_token_id"]).int()
        return {"input_ids": tokens["input_ids"], "mm_token_type_ids": kinds, **pixels}


@pytest.mark.parametrize("config", [glm4v, glm4v_moe])
def test_calibration_with_images(config, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config(), source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 16, 24)]} for seed in range(3)]
    settings = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=settings, calibration=samples, tokenizer=Processor(), samples=3)
    projector = [report for report in result.reports if ".visual.merger." in report.name]
    assert projector and all(report.tokens == 3 * 24 // 4 for report in projector)
    vision = [report for report in result.reports if ".visual.blocks." in report.name]
    assert len(vision) == 2 * 5 and all(report.tokens == 3 * 24 for report in vision)
    inputs = [report for report in result.reports if report.name.endswith("language_model.layers.0.self_attn.q_proj")]
    assert [report.tokens for report in inputs] == [result.calibration.tokens]

    batch = Processor()(["<|begin_of_image|><|image|><|end_of_image|>hi"], samples[0]["images"], "pt")
    with torch.no_grad():
        got, want = load(out)(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = load(out).generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
