"""Idefics 2 and 3 and SmolVLM, on Mistral and Llama, each with images through its own preprocessing."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoProcessor,
    Idefics2Config,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    MistralConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)

import awq_plugin_idefics
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.errors import UnsupportedModelError
from awq_core.hooks.manager import PluginManager
from awq_core.planning import make_plan
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing import ArchitectureConformance, noise_image, save_tiny, tiny_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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
PERCEIVER = {
    "hidden_size": 64,
    "resampler_n_latents": 4,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 16,
    "num_key_value_heads": 2,
}
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer
TOKENS = 4  # of one image: the perceiver's latents; or sixteen patches, four of which become one token


def idefics2():
    return Idefics2Config(
        vision_config=TOWER,
        perceiver_config=PERCEIVER,
        text_config=MistralConfig(**TEXT),
        image_token_id=IMAGE,
    )


def idefics3():
    return Idefics3Config(vision_config=TOWER, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE)


def smolvlm():
    text = LlamaConfig(**{**TEXT, "num_key_value_heads": 4, "tie_word_embeddings": True})
    return SmolVLMConfig(vision_config=TOWER, text_config=text, image_token_id=IMAGE, tie_word_embeddings=True)


class TestIdefics(ArchitectureConformance):
    plugin = "awq_plugin_idefics"

    @staticmethod
    def configs():
        return {"idefics2": idefics2(), "idefics3": idefics3(), "smolvlm": smolvlm()}


def idefics2_processor():
    size = {"shortest_edge": 12, "longest_edge": 16}
    return Idefics2Processor(Idefics2ImageProcessorPil(size=size), tiny_tokenizer(), image_seq_len=TOKENS)


def idefics3_processor():
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
    )
    return Idefics3Processor(images, tiny_tokenizer(), image_seq_len=TOKENS)


class SmolVLMStandIn:
    """SmolVLM's image preprocessing and prompt. transformers' own processor class also wants num2words and, for videos,
    torchvision."""

    image_token = "<image>"

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        side = {"longest_edge": 16}
        self.images = SmolVLMImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)

    def __call__(self, text, images, return_tensors):
        pixels = self.images(images, return_tensors=return_tensors)
        tokens = self.tokenizer([text.replace("<image>", TOKENS * "<image>")], return_tensors=return_tensors)
        return {**tokens, **pixels}


CASES = {
    "idefics2": (idefics2, idefics2_processor),
    "idefics3": (idefics3, idefics3_processor),
    "smolvlm": (smolvlm, SmolVLMStandIn),
}


@pytest.mark.parametrize("name", CASES)
def test_calibration_with_images_and_generation_from_one(name, tmp_path):
    config, make_processor = CASES[name]
    source, out, processor = tmp_path / "source", tmp_path / "out", make_processor()
    save_tiny(config(), source)
    own = name != "smolvlm"
    if own:
        processor.save_pretrained(source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 12, 16)]} for seed in range(3)]
    wanted = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(
        source, out, config=wanted, calibration=samples, samples=3, tokenizer=None if own else processor
    )
    vision = [report for report in result.reports if "vision_model" in report.name]
    projector = [report for report in result.reports if "connector" in report.name]
    language = [report for report in result.reports if "text_model" in report.name]
    # Idefics 2's connector has an MLP of three linears, and two perceiver layers of attention and such an MLP.
    assert (len(vision), len(language)) == (2 * 6, 2 * 7)
    assert len(projector) == (3 + 2 * 7 if name == "idefics2" else 1)
    assert all(report.tokens == result.calibration.tokens for report in language)
    assert all(report.tokens and report.loss <= report.loss_rtn * 1.05 for report in (*vision, *projector))

    if own:
        processor = AutoProcessor.from_pretrained(out)
    batch = processor(text="<image>what?", images=[noise_image(9, 12, 16)], return_tensors="pt")
    assert int((batch["input_ids"] == IMAGE).sum()) == TOKENS
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
        other = {**batch, "pixel_values": -batch["pixel_values"]}
        unlike = model(**other).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert float((got - unlike).norm() / got.norm()) > 1e-2  # the picture is seen
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("components", "kept"),
    [
        ({}, ["model.vision_model", "model.connector"]),
        ({"projector": "4bit"}, ["model.vision_model"]),
        ({"vision": "4bit", "language": "keep"}, ["model.connector", "model.text_model"]),
    ],
    ids=["default", "projector", "vision-alone"],
)
def test_what_is_kept_is_named_by_its_prefix(components, kept, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(idefics3(), source)
    config = QuantConfig(group_size=32, scale=False, clip="none", components=components)
    result = api.quantize(source, out, config=config)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    engines = [name.removeprefix("model.") for name in kept]
    assert sorted(settings["modules_to_not_convert"]) == sorted(["lm_head", *kept, *engines])
    with safe_open(out / "model.safetensors", "pt") as stored:
        packed = {name.removesuffix(".qweight") for name in stored.keys() if name.endswith(".qweight")}  # noqa: SIM118
    assert packed == {linear.name for linear in result.plan.linears if linear.quantize}


def test_the_owner_of_the_text_model_must_be_installed():
    manager = PluginManager()
    manager.register(awq_plugin_idefics, "idefics")
    owner = manager.owner(idefics2())
    with pytest.raises(UnsupportedModelError, match="awq-plugin-mistral"):
        make_plan(build_skeleton(idefics2()), owner, manager, QuantConfig(group_size=32))
