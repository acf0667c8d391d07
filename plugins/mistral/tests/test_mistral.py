"""Dense models with sliding windows, Mixtral, whose router must be compensated, Mistral 4; Mistral 3 with images."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import (
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    Mistral4Config,
    MistralConfig,
    MixtralConfig,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
)

import awq_plugin_mistral
from awq_core import api
from awq_core.config import QuantConfig
from awq_core.hooks.manager import PluginManager
from awq_core.modules import unstack_experts
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing import TINY_DECODER, ArchitectureConformance, proof_error, save_tiny, tiny_tokenizer
from awq_core.testing.tiny import tiny_weights
from awq_plugin_mistral import EXPERT_NAMES, MISTRAL4, MIXTRAL, MIXTRAL_NAMES

TINY = {**TINY_DECODER, "head_dim": 16}


LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer


def mistral4(**options):
    text = {name: value for name, value in TINY.items() if name != "head_dim"}
    return Mistral4Config(**{**text, "num_key_value_heads": 4, **LATENT, **options})


def mistral3(text):
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    return Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, tie_word_embeddings=False)


def mixtral(**options):
    return MixtralConfig(**{**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, **options})


class TestMistral(ArchitectureConformance):
    plugin = "awq_plugin_mistral"

    @staticmethod
    def configs():
        return {
            "mistral": MistralConfig(**TINY, sliding_window=8),
            "mistral-multi-head": MistralConfig(**{**TINY, "num_key_value_heads": 4}, sliding_window=None),
            "ministral": MinistralConfig(**TINY),
            "ministral3": Ministral3Config(**TINY),
            "mixtral": mixtral(),
            "mixtral-multi-head": mixtral(num_key_value_heads=4, num_local_experts=3),
            "mistral4": mistral4(),
            "mistral4-no-query-latent": mistral4(q_lora_rank=None, first_k_dense_replace=0),
            "mistral3-ministral3": mistral3(Ministral3Config(**TINY)),
            "mistral3-mistral4": mistral3(mistral4()),
        }


def unstack(model, names=MIXTRAL_NAMES):
    return unstack_experts(model, "mlp.experts", names)


def test_unstacked_experts_compute_what_the_stack_computes():
    config = mixtral()
    stacked, unstacked = tiny_weights(config, seed=3), tiny_weights(config, seed=3)
    manager = PluginManager()
    manager.register(awq_plugin_mistral, "mistral")
    assert manager.prepare_model(manager.owner(config), unstacked)
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(unstacked(input_ids=ids).logits, stacked(input_ids=ids).logits)
    assert isinstance(unstacked.get_submodule("model.layers.0.mlp.experts.2.w3"), torch.nn.Linear)


def test_a_router_left_out_fails_the_proof():
    """AutoAWQ's Mixtral: every expert listed, the router forgotten. Shapes are fine; the function is not."""
    forgotten = [replace(group, compensate=()) for group in MIXTRAL.scale_groups]
    assert proof_error(mixtral(), MIXTRAL, forgotten, prepare=unstack) > 0.05


def test_only_mixtral_is_prepared():
    dense = build_skeleton(MistralConfig(**TINY))
    manager = PluginManager()
    manager.register(awq_plugin_mistral, "mistral")
    assert not manager.prepare_model(manager.owner(dense.config), dense)


def test_what_mistral4_must_not_leave_out():
    """The router and the shared experts read the second norm, the keys' and values' latent the first."""
    config = mistral4(first_k_dense_replace=0)
    arch = MISTRAL4
    mixture = next(group for group in arch.scale_groups if group.compensate)
    block = next(group for group in arch.scale_groups if "self_attn.q_a_proj" in group.layers)
    cases = [
        (mixture, replace(mixture, compensate=())),
        (mixture, replace(mixture, layers=mixture.layers[:2])),
        (block, replace(block, layers=("self_attn.q_a_proj",))),
    ]
    for right, wrong in cases:
        groups = [wrong if group is right else group for group in arch.scale_groups]
        assert proof_error(config, arch, groups, prepare=partial(unstack, names=EXPERT_NAMES)) > 0.02


class Processor:
    """Pixtral's image preprocessing and its rows of placeholders, each row with a token at its end. transformers' own
    processor class wants torchvision and cannot be built without it."""

    def __init__(self):
        self.tokenizer, self.image_token = tiny_tokenizer(), "<image>"
        self.images = PixtralImageProcessorPil(size={"longest_edge": 32}, patch_size={"height": 8, "width": 8})

    def __call__(self, text, images, return_tensors):
        pixels = self.images(images, return_tensors=return_tensors)
        text = text if isinstance(text, str) else text[0]
        for height, width in pixels["image_sizes"]:
            rows = ("<placeholder>" * (width // 8) + "<|image_pad|>") * (height // 8)
            text = text.replace("<image>", rows, 1)
        tokens = self.tokenizer([text.replace("<placeholder>", "<image>")], return_tensors=return_tensors)
        return {**tokens, **pixels}


@pytest.mark.parametrize("text", [MistralConfig(**TINY), mistral4()], ids=["mistral", "mistral4"])
def test_images_through_the_whole_road(text, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(mistral3(text), source)
    generator = torch.Generator().manual_seed(0)
    noise = [(torch.rand(16, 16 + 8 * i, 3, generator=generator) * 255).byte().numpy() for i in range(3)]
    samples = [{"text": f"picture {i}", "images": [Image.fromarray(noise[i])]} for i in range(3)]
    settings = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=settings, calibration=samples, tokenizer=Processor(), samples=3)
    vision = [report for report in result.reports if "vision_tower" in report.name]
    language = [report for report in result.reports if "language_model" in report.name]
    assert len(vision) == 2 * 7 and all(report.tokens == 4 * 4 + 4 * 6 + 4 * 8 for report in vision)
    assert any("multi_modal_projector" in report.name for report in result.reports)
    assert language and all(report.tokens == result.calibration.tokens for report in language)

    batch = Processor()("<image>what?", samples[0]["images"], "pt")
    with torch.no_grad():
        got, want = load(out)(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = load(out).generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
