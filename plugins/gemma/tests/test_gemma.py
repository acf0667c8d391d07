"""Every Gemma block: norms that multiply by 1 + weight, four norms, query and key norms, shared key-value layers."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoProcessor,
    Gemma2Config,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3nTextConfig,
    Gemma3Processor,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    GemmaConfig,
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    VaultGemmaConfig,
)

import awq_plugin_gemma
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.hooks import ScaleGroup
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER, ArchitectureConformance, noise_image, proof_error, save_tiny, tiny_tokenizer

TINY = {**TINY_DECODER, "head_dim": 16, "pad_token_id": 0}
KINDS = ["sliding_attention", "full_attention"]
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def gemma3(**options):
    return Gemma3Config(
        text_config={**TINY, "layer_types": KINDS, "sliding_window": 8},
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_index=2,
        boi_token_index=4,
        eoi_token_index=5,
        **options,
    )


def gemma3n(**options):
    return Gemma3nTextConfig(
        **{**TINY, "num_hidden_layers": 4},
        layer_types=2 * KINDS,
        num_kv_shared_layers=2,
        activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
        laurel_rank=32,
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=128,
        **options,
    )


GEMMA4 = {
    **TINY,
    "num_hidden_layers": 4,
    "layer_types": 2 * KINDS,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 128,
    "per_layer_config": {f"{index:02d}": {"head_dim": 32} for index in (1, 3)},
}


def gemma4(**options):
    return Gemma4TextConfig(**{**GEMMA4, **options})


def gemma4_multimodal():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "patch_size": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return Gemma4Config(text_config=GEMMA4, vision_config={**tower, **heads}, audio_config=None, image_token_id=2)


class TestGemma(ArchitectureConformance):
    plugin = "awq_plugin_gemma"

    @staticmethod
    def configs():
        return {
            "gemma-multi-query": GemmaConfig(**{**TINY, "num_key_value_heads": 1}),
            "gemma-multi-head": GemmaConfig(**{**TINY, "num_key_value_heads": 4}),
            "gemma2": Gemma2Config(**TINY, sliding_window=8, query_pre_attn_scalar=16),
            "vaultgemma": VaultGemmaConfig(**TINY, sliding_window=8),
            "gemma3_text": Gemma3TextConfig(**TINY, layer_types=KINDS, sliding_window=8),
            "gemma3_text-biases": Gemma3TextConfig(**TINY, attention_bias=True),
            "gemma3": gemma3(),
            "gemma3n_text": gemma3n(),
            "gemma4_text": gemma4(),
            "gemma4_text-one-linear-for-key-and-value": gemma4(
                num_kv_shared_layers=0, attention_k_eq_v=True, hidden_size_per_layer_input=0
            ),
            "gemma4_text-experts": gemma4(
                num_kv_shared_layers=0,
                hidden_size_per_layer_input=0,
                enable_moe_block=True,
                num_experts=3,
                top_k_experts=2,
                moe_intermediate_size=32,
            ),
            "gemma4": gemma4_multimodal(),
            "recurrent_gemma": RecurrentGemmaConfig(
                **{**TINY, "num_hidden_layers": 3, "intermediate_size": 192}, lru_width=64, attention_window_size=8
            ),
        }


def test_norms_multiply_by_one_plus_weight():
    """Without `norm_offset` shapes are right and the function is not."""
    for config in (GemmaConfig(**TINY), Gemma3TextConfig(**TINY)):
        arch = default_manager().owner(config).arch
        plain = [replace(group, norm_offset=0.0) for group in arch.scale_groups]
        assert proof_error(config, arch, plain) > 0.05


def test_gemma2_is_not_gemma():
    """Behind attention stands a norm with Llama's name for the one before the MLP: nothing there reads it."""
    assert proof_error(Gemma2Config(**TINY), awq_plugin_gemma.GEMMA2, awq_plugin_gemma.BLOCK) > 0.05


def test_gemma3n_adds_its_input_norm_to_the_residual():
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "laurel.linear_left")
    group = ScaleGroup(prev="input_layernorm", layers=linears, optional=True)
    assert proof_error(gemma3n(), awq_plugin_gemma.GEMMA3N, [group]) > 0.05


def test_gemma3n_norms_its_values():
    group = ScaleGroup(
        prev="self_attn.v_proj", layers=("self_attn.o_proj",), head_dim="self_attn.head_dim", optional=True
    )
    assert proof_error(gemma3n(), awq_plugin_gemma.GEMMA3N, [group]) > 0.05


@pytest.mark.parametrize(
    "config",
    [
        GemmaConfig,
        Gemma2Config,
        Gemma3TextConfig,
        Gemma3nTextConfig,
        Gemma4TextConfig,
        VaultGemmaConfig,
        RecurrentGemmaConfig,
    ],
)
def test_the_sizes_of_released_models_can_be_proved(config):
    """The proof runs on a narrow and shallow version of the configuration that the family's models have."""
    config = config()
    proof = prove(config, default_manager().owner(config), default_manager())
    assert proof.groups and proof.proved


@pytest.fixture
def source(tmp_path):
    """A tiny Gemma 3 with its own processor, as a checkpoint folder."""
    folder = tmp_path / "source"
    save_tiny(gemma3(), folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token="<|end|>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<|vision_start|>", "eoi_token": "<|vision_end|>"},
    )
    pixels = Gemma3ImageProcessorPil(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    Gemma3Processor(pixels, tokenizer, image_seq_length=4).save_pretrained(folder)
    return folder


def test_calibration_with_images_and_generation_from_one(source, tmp_path):
    out = tmp_path / "out"
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 20, 24)]} for seed in range(3)]
    config = QuantConfig(group_size=32, components={"vision": "4bit"})
    result = api.quantize(source, out, config=config, calibration=samples, samples=3)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    language = [report for report in result.reports if "language_model" in report.name]
    assert len(vision) == 2 * 6 and len(language) == 14
    assert all(report.tokens == 3 * 16 for report in vision)
    assert all(report.tokens == result.calibration.tokens for report in language)

    batch = AutoProcessor.from_pretrained(out)(
        text="<|vision_start|>what?", images=noise_image(0, 20, 24), return_tensors="pt"
    )
    assert int((batch["input_ids"] == 2).sum()) == 4
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


class Gemma4Processor:
    """Stands in for Gemma 4's, which makes 70 tokens of an image at least: 6 x 3 patches, nine of which are a token."""

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.image_token = "<image>"

    def __call__(self, text, images, return_tensors):
        pixels = torch.tensor(list(images[0].resize((24, 12)).getdata())).view(12, 24, 3) / 255
        patches = pixels.view(3, 4, 6, 4, 3).transpose(1, 2).reshape(1, 18, 48)
        places = torch.tensor([[[x, y] for y in range(3) for x in range(6)]])
        tokens = self.tokenizer([text.replace("<image>", 2 * "<image>")], return_tensors=return_tensors)
        return {**tokens, "pixel_values": patches, "image_position_ids": places}


def test_gemma4_with_images(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(gemma4_multimodal(), source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 20, 24)]} for seed in range(3)]
    config = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=config, calibration=samples, tokenizer=Gemma4Processor(), samples=3)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    projector = [report for report in result.reports if "embed_vision" in report.name]
    assert len(vision) == 2 * 7 and len(projector) == 1
    assert {report.tokens for report in vision} == {3 * 18} and projector[0].tokens == 3 * 2

    batch = Gemma4Processor()("<image>what?", [noise_image(0, 20, 24)], "pt")
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
