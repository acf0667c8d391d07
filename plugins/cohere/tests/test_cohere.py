"""Parallel blocks: with query and key norms, sliding windows, experts, and a vision tower."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import (
    AutoProcessor,
    AyaVisionConfig,
    AyaVisionProcessor,
    Cohere2Config,
    Cohere2MoeConfig,
    Cohere2VisionConfig,
    CohereConfig,
    GotOcr2ImageProcessorPil,
    SiglipVisionConfig,
)

import awq_plugin_cohere
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing import TINY_DECODER, ArchitectureConformance, noise_image, proof_error, save_tiny, tiny_tokenizer
from awq_plugin_cohere import COHERE, COHERE2_MOE

TINY = {**TINY_DECODER, "pad_token_id": 0}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 16}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
PATCH = 3  # id of "<|image_pad|>" in the kit's tiny tokenizer


def moe(**options):
    return Cohere2MoeConfig(**TINY, **WINDOWS, **{"num_experts": 4, "num_experts_per_tok": 2, **options})


def aya_vision():
    return AyaVisionConfig(
        text_config=Cohere2Config(**TINY, **WINDOWS),
        vision_config=SiglipVisionConfig(**TOWER),
        image_token_index=PATCH,
        alignment_intermediate_size=64,
        downsample_factor=2,
    )


def cohere2_vision():
    return Cohere2VisionConfig(
        text_config=Cohere2Config(**TINY, **WINDOWS),
        vision_config=SiglipVisionConfig(**TOWER),
        image_token_id=PATCH,
        alignment_intermediate_size=64,
    )


class TestCohere(ArchitectureConformance):
    plugin = "awq_plugin_cohere"

    @staticmethod
    def configs():
        return {
            "cohere": CohereConfig(**{**TINY, "num_key_value_heads": 4}),
            "cohere-grouped-query-qk-norm": CohereConfig(**TINY, use_qk_norm=True, attention_bias=True),
            "cohere2": Cohere2Config(**TINY, **WINDOWS),
            "cohere2_moe": moe(),
            "cohere2_moe-shared": moe(num_shared_experts=2, expert_selection_fn="sigmoid"),
            "cohere2_moe-dense-first": moe(
                mlp_layer_types=["dense", "sparse"], prefix_dense_intermediate_size=96, rms_norm_eps=1e-5
            ),
            "aya_vision": aya_vision(),
            "cohere2_vision": cohere2_vision(),
        }


def test_attention_and_mlp_read_one_norm():
    one, *others = COHERE.scale_groups
    attention = replace(one, layers=awq_plugin_cohere.QKV)
    assert proof_error(CohereConfig(**TINY), COHERE, (attention, *others)) > 0.05


def test_the_router_reads_that_norm_too():
    block = build_skeleton(moe()).get_submodule("model.layers.0")
    one, *others = awq_plugin_cohere.awq_scale_groups(COHERE2_MOE, None, block)
    prepare = partial(awq_plugin_cohere.awq_prepare_model, COHERE2_MOE)
    assert proof_error(moe(), COHERE2_MOE, (one, *others), prepare=prepare) < 1e-4
    assert proof_error(moe(), COHERE2_MOE, (replace(one, compensate=()), *others), prepare=prepare) > 0.05


@pytest.mark.parametrize("config", [CohereConfig(), Cohere2Config(), Cohere2MoeConfig(), AyaVisionConfig()])
def test_the_sizes_of_released_models_can_be_proved(config):
    """The proof runs on a narrow and shallow version of the configuration that the family's models have."""
    proof = prove(config, default_manager().owner(config), default_manager())
    assert proof.groups and proof.proved


@pytest.fixture
def source(tmp_path):
    """A tiny Aya Vision with its own processor, as a checkpoint folder."""
    folder = tmp_path / "source"
    save_tiny(aya_vision(), folder)
    AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=False),
        tokenizer=tiny_tokenizer(),
        patch_size=4,
        img_size=16,
        downsample_factor=2,
        start_of_img_token="<|vision_start|>",
        end_of_img_token="<|vision_end|>",
        img_patch_token="<|image_pad|>",
    ).save_pretrained(folder)
    return folder


def test_calibration_with_images_and_generation_from_one(source, tmp_path):
    out = tmp_path / "out"
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 20, 24)]} for seed in range(3)]
    config = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=config, calibration=samples, samples=3)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    projector = [report for report in result.reports if "projector" in report.name]
    language = [report for report in result.reports if "language_model" in report.name]
    assert (len(vision), len(projector), len(language)) == (2 * 6, 2, 2 * 7)
    # Sixteen patches a tile, of which the projector joins four into one.
    assert {report.tokens for report in vision} == {4 * report.tokens for report in projector}
    assert all(report.tokens == result.calibration.tokens for report in language)

    batch = AutoProcessor.from_pretrained(out)(text="<image>what?", images=noise_image(0, 20, 24), return_tensors="pt")
    assert int((batch["input_ids"] == PATCH).sum()) == 4 * len(batch["pixel_values"])
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


class Processor:
    """Stands in for Command A Vision's, which needs torchvision: one tile an image, a token for four patches."""

    def __init__(self):
        self.tokenizer, self.image_token = tiny_tokenizer(), "<|image_pad|>"
        self.images = GotOcr2ImageProcessorPil(size={"height": 16, "width": 16}, crop_to_patches=False)

    def __call__(self, text, images, return_tensors):
        tile = f"<|vision_start|>{4 * self.image_token}<|vision_end|>"
        tokens = self.tokenizer(text.replace(self.image_token, tile), return_tensors=return_tensors)
        return {**tokens, "pixel_values": self.images(images, return_tensors=return_tensors)["pixel_values"]}


def test_cohere2_vision_with_images(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(cohere2_vision(), source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 20, 24)]} for seed in range(3)]
    config = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=config, calibration=samples, tokenizer=Processor(), samples=3)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    projector = [report for report in result.reports if "projector" in report.name]
    assert (len(vision), len(projector)) == (2 * 6, 2)
    assert {report.tokens for report in vision} == {3 * 16} and {report.tokens for report in projector} == {3 * 4}

    batch = Processor()("<|image_pad|>what?", [noise_image(9, 20, 24)], "pt")
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
