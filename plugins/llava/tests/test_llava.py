"""LLaVA on three language models, each owned by its own plugin, with CLIP, SigLIP and Pixtral towers."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    LlavaProcessor,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import awq_plugin_llava
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.errors import CalibrationError, UnsupportedModelError
from awq_core.hooks.manager import PluginManager
from awq_core.planning import make_plan
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing import ArchitectureConformance, save_tiny, tiny_tokenizer

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer


def llava(**options):
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TINY), image_token_index=IMAGE, **options
    )


class TestLlava(ArchitectureConformance):
    plugin = "awq_plugin_llava"

    @staticmethod
    def configs():
        return {
            "llava-llama": llava(),
            "llava-pixtral": LlavaConfig(
                vision_config=PixtralVisionConfig(**TOWER),
                text_config=MistralConfig(**TINY),
                image_token_index=IMAGE,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            ),
            "llava_next-mistral": LlavaNextConfig(
                vision_config=CLIPVisionConfig(**TOWER),
                text_config=MistralConfig(**TINY),
                image_token_index=IMAGE,
                image_grid_pinpoints=[[16, 32], [32, 16]],
            ),
            "llava_onevision-qwen": LlavaOnevisionConfig(
                vision_config=SiglipVisionConfig(**TOWER),
                text_config=Qwen2Config(**TINY),
                image_token_index=IMAGE,
                image_grid_pinpoints=[[16, 32], [32, 16]],
                vision_feature_layer=-1,
            ),
        }


@pytest.fixture
def pictures(tmp_path):
    """Four noise images of unequal size, each with a caption beside it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        pixels = (torch.rand(16 + 4 * index, 20, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture number {index}, all noise and colour")
    return folder


@pytest.fixture
def source(tmp_path):
    """A tiny LLaVA with its own processor, as a checkpoint folder."""
    folder = tmp_path / "source"
    save_tiny(llava(), folder)
    side = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


def test_calibration_with_images_and_generation_from_one(source, pictures, tmp_path):
    out = tmp_path / "out"
    result = api.quantize(source, out, config=QuantConfig(group_size=32), calibration=str(pictures), samples=4)
    language = [report for report in result.reports if "language_model" in report.name]
    assert len(language) == len(result.reports) == 14
    # Each sample is its caption and one token for each of the image's sixteen patches.
    assert all(report.tokens == result.calibration.tokens > 4 * 16 for report in language)
    assert (out / "processor_config.json").exists() or (out / "preprocessor_config.json").exists()

    processor, model = AutoProcessor.from_pretrained(out), api.load(out)
    batch = processor(text="<image>what is it?", images=Image.open(pictures / "0.png"), return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


def test_mixed_precision_chooses_among_the_language_blocks(source, pictures, tmp_path):
    config = QuantConfig(group_size=32, components={"projector": "4bit"})
    options = {"config": config, "calibration": str(pictures), "samples": 4, "target_bits": 14}
    result = api.quantize(source, tmp_path / "out", **options)
    assert 0 < result.allocation.kept < len(result.allocation.choices) == 8
    assert all("language_model" in choice.unit.block and choice.cost > 0 for choice in result.allocation.choices)
    kept = {one.name for choice in result.allocation.choices if choice.kept for one in choice.unit.linears}
    language = [one for one in result.plan.linears if "language_model" in one.name]
    assert {one.name for one in language if not one.quantize} == kept
    assert any("multi_modal_projector" in report.name for report in result.reports)


def test_vision_and_projector_are_quantized_on_request(source, pictures, tmp_path):
    config = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, tmp_path / "out", config=config, calibration=str(pictures), samples=4)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    projector = [report for report in result.reports if "multi_modal_projector" in report.name]
    assert len(vision) == 3 * 6 and len(projector) == 2
    assert all(report.tokens == 4 * 17 for report in vision)  # sixteen patches and the class token
    assert all(report.loss <= report.loss_rtn * 1.05 for report in (*vision, *projector))
    pixels = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    features = [load(tmp_path / name).get_image_features(**pixels) for name in ("out", "source")]
    got, want = (torch.cat(list(one.pooler_output)) for one in features)
    assert 1e-4 < float((got - want).norm() / want.norm()) < 0.3


def test_text_alone_does_not_reach_the_vision_tower(source, tmp_path):
    config = QuantConfig(group_size=32, components={"vision": "4bit"})
    with pytest.raises(CalibrationError, match=r"vision_tower.*vision=keep"):
        api.quantize(source, tmp_path / "out", config=config, calibration=["only words " * 50], samples=2, seq_len=16)
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_owner_of_the_text_model_must_be_installed():
    manager = PluginManager()
    manager.register(awq_plugin_llava, "llava")
    skeleton = build_skeleton(llava())
    owner = manager.owner(llava())
    with pytest.raises(UnsupportedModelError, match="awq-plugin-llama"):
        make_plan(skeleton, owner, manager, QuantConfig(group_size=32))
