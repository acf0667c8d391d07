"""PaliGemma on Gemma (one key-value head) and Gemma 2, with and without the tower's pooling head, with images."""

import pytest
import torch
from transformers import (
    AutoProcessor,
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from awq_core import api
from awq_core.config import QuantConfig
from awq_core.runtime.load import load
from awq_core.testing import ArchitectureConformance, noise_image, save_tiny, tiny_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer
TOKENS = 16  # of one image


def paligemma(text, **tower):
    return PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**{"vision_use_head": False, **TOWER, **tower}),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        vocab_size=128,
    )


def paligemma1():
    return paligemma(GemmaConfig(**TEXT))


def paligemma2(**tower):
    text = Gemma2Config(**{**TEXT, "num_key_value_heads": 2, "query_pre_attn_scalar": 16, "sliding_window": 16})
    return paligemma(text, **tower)


class TestPaliGemma(ArchitectureConformance):
    plugin = "awq_plugin_paligemma"

    @staticmethod
    def configs():
        return {"paligemma": paligemma1()}


class TestPaliGemma2(ArchitectureConformance):
    plugin = "awq_plugin_paligemma"
    caches = ("dynamic",)  # transformers' own PaliGemma 2 generates with no other

    @staticmethod
    def configs():
        return {"paligemma2": paligemma2(), "paligemma2-head": paligemma2(vision_use_head=True)}


def processor():
    images = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    images.image_seq_length = TOKENS
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    return PaliGemmaProcessor(images, tokenizer)


@pytest.mark.parametrize("config", [paligemma1(), paligemma2(vision_use_head=True)], ids=["gemma", "gemma2-head"])
def test_calibration_with_images_and_generation_from_one(config, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config, source)
    processor().save_pretrained(source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 20, 24)]} for seed in range(3)]
    wanted = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=wanted, calibration=samples, samples=3)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    projector = [report for report in result.reports if "projector" in report.name]
    language = [report for report in result.reports if "language_model" in report.name]
    assert (len(vision), len(projector), len(language)) == (2 * 6, 1, 2 * 7)
    assert all(report.tokens == 3 * TOKENS for report in (*vision, *projector))
    assert all(report.tokens == result.calibration.tokens > 3 * TOKENS for report in language)

    batch = AutoProcessor.from_pretrained(out)(text="<image>what?", images=noise_image(9, 20, 24), return_tensors="pt")
    assert int((batch["input_ids"] == IMAGE).sum()) == TOKENS
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
        unlike = model(**{**batch, "pixel_values": -batch["pixel_values"]}).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert float((got - unlike).norm() / got.norm()) > 1e-2  # the picture is seen
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
