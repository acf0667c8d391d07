"""Qwen 2 and 3: dense, mixtures (also with dense layers in between), hybrids, vision-language."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5OmniThinkerConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    Qwen3OmniMoeThinkerConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from awq_core import api
from awq_core.calibration.trace import record
from awq_core.config import QuantConfig
from awq_core.modules import unstack_experts
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance, noise_image, proof_error, save_tiny, tiny_tokenizer
from awq_core.testing.tiny import tiny_weights
from awq_plugin_qwen import HYBRID

MOE = {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
# Ids of the placeholders in the kit's tiny tokenizer.
IMAGES = {"image_token_id": 3, "vision_start_token_id": 4, "vision_end_token_id": 5, "video_token_id": 6}


def qwen2_vl(**options):
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return Qwen2VLConfig(text_config={**TINY, "rope_parameters": MROPE}, vision_config=vision, **IMAGES, **options)


def qwen2_5_vl(**options):
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(text_config={**TINY, "rope_parameters": MROPE}, vision_config=vision, **IMAGES, **options)


VISION3 = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 64,
}
ROPE3 = {"head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}}
AUDIO = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "output_dim": 64,
    "n_window": 8,
    "max_source_positions": 64,
}
DELTA = {
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}


def qwen3_vl(**options):
    vision = {**VISION3, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config={**TINY, **ROPE3}, vision_config=vision, **IMAGES, **options)


def qwen3_vl_moe():
    vision = {**VISION3, "deepstack_visual_indexes": [0]}
    return Qwen3VLMoeConfig(text_config={**MOE, **ROPE3}, vision_config=vision, **IMAGES)


def qwen3_next(**options):
    return Qwen3NextConfig(**{**MOE, **DELTA, "shared_expert_intermediate_size": 64, **options})


def qwen3_5():
    text = {**TINY, **DELTA, **ROPE3}
    classes = ["Qwen3_5ForConditionalGeneration"]
    return Qwen3_5Config(text_config=text, vision_config=VISION3, architectures=classes, **IMAGES)


def qwen3_5_moe():
    text = {**MOE, **DELTA, **ROPE3, "shared_expert_intermediate_size": 64}
    classes = ["Qwen3_5MoeForConditionalGeneration"]
    return Qwen3_5MoeConfig(text_config=text, vision_config=VISION3, architectures=classes, **IMAGES)


def qwen3_omni():
    return Qwen3OmniMoeThinkerConfig(
        text_config={**MOE, **ROPE3},
        vision_config={**VISION3, "deepstack_visual_indexes": [0]},
        audio_config={**AUDIO, "n_window_infer": 16, "conv_chunksize": 8, "downsample_hidden_size": 16},
        **IMAGES,
        audio_token_id=7,
        audio_start_token_id=8,
    )


def qwen2_5_omni():
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    return Qwen2_5OmniThinkerConfig(
        text_config={**TINY, "rope_parameters": MROPE},
        vision_config={**vision, "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]},
        audio_config=AUDIO,
        image_token_index=IMAGES["image_token_id"],
        video_token_index=IMAGES["video_token_id"],
        vision_start_token_id=IMAGES["vision_start_token_id"],
        audio_token_index=7,
        audio_start_token_id=8,
        audio_end_token_id=9,
    )


class TestQwen(ArchitectureConformance):
    plugin = "awq_plugin_qwen"

    @staticmethod
    def configs():
        return {
            "qwen2": Qwen2Config(**TINY),
            "qwen2-multi-head-tied": Qwen2Config(**{**TINY, "num_key_value_heads": 4}, tie_word_embeddings=True),
            "qwen3": Qwen3Config(**TINY, head_dim=16),
            "qwen2_moe": Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=64),
            "qwen2_moe-mixed": Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=64, mlp_only_layers=[0]),
            "qwen3_moe": Qwen3MoeConfig(**MOE, head_dim=16),
            "qwen3_moe-sparse-step": Qwen3MoeConfig(**MOE, head_dim=16, decoder_sparse_step=2),
            "qwen2_vl": qwen2_vl(),
            "qwen2_5_vl": qwen2_5_vl(),
            "qwen3_vl": qwen3_vl(),
            "qwen3_vl_moe": qwen3_vl_moe(),
            "qwen3_next": qwen3_next(),
            "qwen3_next-mixed": qwen3_next(mlp_only_layers=[0], num_key_value_heads=4),
            "qwen3_5": qwen3_5(),
            "qwen3_5_moe": qwen3_5_moe(),
            "qwen2_5_omni_thinker": qwen2_5_omni(),
            "qwen3_omni_moe_thinker": qwen3_omni(),
        }


class Processor:
    """Qwen's image preprocessing and placeholder expansion. transformers' own processor class also wants torchvision,
    for videos, and cannot be built without it. `kinds`: says which tokens are an image's, as all but Omni's do."""

    def __init__(self, kinds=True):
        self.kinds = kinds
        self.tokenizer = tiny_tokenizer()
        self.images = Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        )

    def __call__(self, text, images, return_tensors):
        pixels = self.images(images, return_tensors=return_tensors)
        merged = [int(grid.prod()) // 4 for grid in pixels["image_grid_thw"]]
        for tokens in merged:
            text = [text[0].replace("<|image_pad|>", "<placeholder>" * tokens, 1)]
        tokens = self.tokenizer([text[0].replace("<placeholder>", "<|image_pad|>")], return_tensors=return_tensors)
        kinds = (tokens["input_ids"] == IMAGES["image_token_id"]).int()
        return {"input_ids": tokens["input_ids"], **({"mm_token_type_ids": kinds} if self.kinds else {}), **pixels}


IMAGE_MODELS = [qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe, qwen2_5_omni, qwen3_omni]


@pytest.mark.parametrize("config", IMAGE_MODELS)
def test_calibration_with_images(config, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config(), source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 16, 24)]} for seed in range(3)]
    settings = QuantConfig(group_size=32, components={"vision": "4bit"})
    processor = Processor(kinds=config not in (qwen2_5_omni, qwen3_omni))
    result = api.quantize(source, out, config=settings, calibration=samples, tokenizer=processor, samples=3)
    vision = [report for report in result.reports if ".visual." in report.name]
    language = [report for report in result.reports if ".language_model." in report.name]
    expected = 14 if config in (qwen2_vl, qwen2_5_vl, qwen3_vl, qwen2_5_omni) else 13
    mixture = {qwen3_vl_moe: 2 * (4 + 3 * 4), qwen3_omni: 2 * (4 + 3 * 4), qwen3_5_moe: 3 + 4 + 2 * (3 + 3 * 4)}
    assert vision and len(language) == mixture.get(config, expected)
    assert all(report.tokens == 3 * 24 for report in vision)  # 4 x 6 patches of 4 x 4 pixels each
    assert all(report.tokens == result.calibration.tokens for report in language)

    batch = processor(["<|vision_start|><|image_pad|><|vision_end|>hi"], samples[0]["images"], "pt")
    with torch.no_grad():
        got, want = load(out)(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = load(out).generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


def test_features_added_between_blocks_reach_calibration(tmp_path):
    """Qwen3-VL adds image features after its first blocks. The recorded inputs must equal those of a real pass."""
    model = tiny_weights(qwen3_vl())
    batch = Processor()(["<|vision_start|><|image_pad|><|vision_end|>hello"], [noise_image(0, 16, 24)], "pt")
    blocks = list(model.get_submodule("model.language_model.layers"))
    seen = []
    handles = [block.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for block in blocks]
    with torch.no_grad():
        model(**batch)
        for handle in handles:
            handle.remove()
        inputs = record(model, blocks, [batch])
        assert inputs.calls[1][0].between is not None
        torch.testing.assert_close(inputs.hidden[0], seen[0])
        inputs.advance(0, blocks[0])
        torch.testing.assert_close(inputs.hidden[0], seen[1])


def test_what_a_hybrid_must_not_leave_out():
    """The small projections b and a, the gate of the shared expert, the 1 in 1 + w, one scale for every head."""
    config, groups, unstack = qwen3_next(), HYBRID.scale_groups, partial(unstack_experts, suffix="mlp.experts")
    delta = next(group for group in groups if "linear_attn.in_proj_ba" in group.compensate)
    mixture = next(group for group in groups if "mlp.gate" in group.compensate)
    gated = next(group for group in groups if group.prev == "linear_attn.norm")
    for right, wrong in (
        (delta, replace(delta, compensate=())),
        (mixture, replace(mixture, compensate=("mlp.gate",))),
        (mixture, replace(mixture, norm_offset=0.0)),
        (gated, replace(gated, norm_offset=1.0)),
    ):
        broken = [wrong if group is right else group for group in groups]
        assert proof_error(config, HYBRID, broken, prepare=unstack) > 0.01
    assert proof_error(config, HYBRID, groups, prepare=unstack) < 1e-5
