"""LLaVA and its successors on three language models, each owned by its own plugin, with CLIP, SigLIP and Pixtral
towers. Processors are transformers' own where they can be built: those of LLaVA-NeXT-Video, LLaVA-OneVision and
Video-LLaVA want torchvision for their frames, so LLaVA-NeXT's and LLaVA's stand in, which lay out images alike."""

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
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VipLlavaConfig,
)

import awq_plugin_llava
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.errors import CalibrationError, UnsupportedModelError
from awq_core.hooks.manager import PluginManager
from awq_core.planning import make_plan
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance, save_tiny, tiny_tokenizer

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
IMAGE, VIDEO = 2, 6  # ids of "<image>" and "<|video_pad|>" in the kit's tiny tokenizer
GRID = [[16, 32], [32, 16]]


def llava(**options):
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**TINY), image_token_index=IMAGE, **options
    )


def llava_next(config=LlavaNextConfig, **options):
    vision, text = CLIPVisionConfig(**TOWER), MistralConfig(**TINY)
    return config(vision_config=vision, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=GRID, **options)


def llava_onevision():
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config=Qwen2Config(**TINY),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=GRID,
        vision_feature_layer=-1,
    )


def vipllava():
    vision, text = CLIPVisionConfig(**TOWER), LlamaConfig(**TINY)
    return VipLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layers=[-2, -1]
    )


def video_llava():
    vision, text = CLIPVisionConfig(**TOWER), LlamaConfig(**TINY)
    return VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO)


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
            "llava_next-mistral": llava_next(),
            "llava_next_video-mistral": llava_next(LlavaNextVideoConfig, video_token_index=VIDEO),
            "llava_onevision-qwen": llava_onevision(),
            "vipllava-llama": vipllava(),
            "video_llava-llama": video_llava(),
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


SIDE = {"height": 16, "width": 16}
OPTIONS = {"patch_size": 4, "image_token": "<image>"}
CLASS_TOKEN = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def one_tile():
    images = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    return LlavaProcessor(image_processor=images, tokenizer=tiny_tokenizer(), **OPTIONS, **CLASS_TOKEN)


def tiles():
    images = LlavaNextImageProcessorPil(size=SIDE, crop_size=SIDE, image_grid_pinpoints=GRID)
    return LlavaNextProcessor(image_processor=images, tokenizer=tiny_tokenizer(), **OPTIONS, **CLASS_TOKEN)


def tiles_without_class_token():
    images = LlavaOnevisionImageProcessorPil(size=SIDE, image_grid_pinpoints=GRID)
    strategy = {"vision_feature_select_strategy": "full"}
    return LlavaNextProcessor(image_processor=images, tokenizer=tiny_tokenizer(), **OPTIONS, **strategy)


@pytest.fixture
def source(tmp_path):
    """A tiny LLaVA with its own processor, as a checkpoint folder."""
    folder = tmp_path / "source"
    save_tiny(llava(), folder)
    one_tile().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "processor"),
    [
        (llava_next(), tiles),
        (llava_next(LlavaNextVideoConfig, video_token_index=VIDEO), tiles),
        (llava_onevision(), tiles_without_class_token),
        (vipllava(), one_tile),
        (video_llava(), one_tile),
    ],
    ids=["llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava"],
)
def test_images_through_the_whole_road(config, processor, pictures, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config, source)
    processor().save_pretrained(source)
    settings = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=settings, calibration=str(pictures), samples=4)
    by_part = {
        part: [report for report in result.reports if part in report.name]
        for part in ("image_tower", "video_tower", "vision_tower", "multi_modal_projector", "language_model")
    }
    assert len(by_part["image_tower"] + by_part["vision_tower"]) == 3 * 6 and not by_part["video_tower"]
    assert len(by_part["multi_modal_projector"]) == 2
    assert len(by_part["language_model"]) == 14
    assert all(report.tokens == result.calibration.tokens > 4 * 16 for report in by_part["language_model"])

    mine, model, unpacked = AutoProcessor.from_pretrained(out), api.load(out), api.load(out, fake_quant=True)
    batch = mine(text="<image>what is it?", images=Image.open(pictures / "0.png"), return_tensors="pt")
    with torch.no_grad():
        got, want = model(**batch).logits, unpacked(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


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
