"""Phi's parallel block, Phi-3's fused linears (multi-head and grouped-query), its experts, and Phi-4 with images."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import Phi3Config, Phi4MultimodalConfig, PhiConfig, PhimoeConfig

import awq_plugin_phi
from awq_core import api
from awq_core.calibration import CalibrationData
from awq_core.config import QuantConfig
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER, ArchitectureConformance, noise_image, proof_error, save_tiny, tiny_tokenizer
from awq_core.testing.tiny import tiny_weights

TINY = {**TINY_DECODER, "pad_token_id": 0}
MULTI_HEAD = {**TINY, "num_key_value_heads": 4}
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer


def phi4_multimodal():
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    image = {"image_size": 16, "crop_size": 16, "patch_size": 4, "image_token_id": IMAGE}
    speech = {"hidden_size": 32, "intermediate_size": 48, "num_blocks": 2, "num_attention_heads": 2}
    convolutions = {"ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32, "nemo_conv_channels": 8}
    return Phi4MultimodalConfig(
        **TINY,
        vision_config={**tower, **image},
        audio_config={**speech, **convolutions, "bias_max_distance": 10, "audio_token_id": 3},
    )


def phimoe():
    return PhimoeConfig(**TINY, num_local_experts=4, attention_bias=True, lm_head_bias=True, sliding_window=8)


class TestPhi(ArchitectureConformance):
    plugin = "awq_plugin_phi"

    @staticmethod
    def configs():
        return {
            "phi": PhiConfig(**MULTI_HEAD),
            "phi-grouped-query-qk-norm": PhiConfig(**TINY, qk_layernorm=True),
            "phi3": Phi3Config(**MULTI_HEAD),
            "phi3-grouped-query": Phi3Config(**TINY, sliding_window=8, tie_word_embeddings=True),
            "phi4_multimodal": phi4_multimodal(),
            "phimoe": phimoe(),
            "phimoe-multi-head": PhimoeConfig(**MULTI_HEAD, num_local_experts=3),
        }


def changed(config, change):
    """The error of the proof with each of the model's groups replaced by `change` of it."""
    arch = default_manager().owner(config).arch
    prepare = partial(awq_plugin_phi.awq_prepare_model, arch)
    return proof_error(config, arch, [change(group) for group in arch.scale_groups], prepare=prepare)


def test_attention_and_mlp_read_one_norm():
    def change(group):
        return replace(group, layers=tuple(name for name in group.layers if name != "mlp.fc1"))

    assert changed(PhiConfig(**TINY), change) > 0.05


def test_values_are_fewer_than_the_output_projection_reads():
    """AutoAWQ divides as many of the last rows of qkv as the output projection has inputs: keys and queries too."""

    def change(group):
        return replace(group, head_dim="")

    assert changed(Phi3Config(**TINY), change) > 0.05
    assert changed(Phi3Config(**MULTI_HEAD), change) < 1e-4


@pytest.mark.parametrize("config", [Phi3Config(**TINY), Phi3Config(**MULTI_HEAD), phi4_multimodal()])
def test_every_declared_group_applies(config):
    """qkv -> o is not set aside under grouped-query attention: its scales are shared by head."""
    manager = default_manager()
    assert prove(config, manager.owner(config), manager).groups == 2 * 4


def test_the_router_reads_what_the_experts_read():
    def change(group):
        return replace(group, compensate=())

    assert changed(phimoe(), change) > 0.05


def test_unstacked_experts_compute_what_the_stack_computes():
    stacked, unstacked = tiny_weights(phimoe(), seed=3), tiny_weights(phimoe(), seed=3)
    assert default_manager().prepare_model(default_manager().owner(phimoe()), unstacked)
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(unstacked(input_ids=ids).logits, stacked(input_ids=ids).logits)


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 48 for i in range(48)],
    "long_factor": [1.0 + i for i in range(48)],
}


@pytest.mark.parametrize(
    "config",
    [
        PhiConfig(),
        Phi3Config(pad_token_id=0),
        Phi3Config(pad_token_id=0, max_position_embeddings=131072, rope_parameters=LONG),
        PhimoeConfig(),
        Phi4MultimodalConfig(),
    ],
    ids=["phi", "phi3", "phi3-long", "phimoe", "phi4_multimodal"],
)
def test_the_sizes_of_released_models_can_be_proved(config):
    """The proof runs on a narrow and shallow version of the configuration that the family's models have."""
    proof = prove(config, default_manager().owner(config), default_manager())
    assert proof.groups and proof.proved


class Processor:
    """Stands in for Phi-4's, which needs torchvision: one crop of 16 x 16 pixels beside the whole image. Each gives a
    square of 2 x 2 features with a separator behind every row, and one stands between them: 13 tokens."""

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        self.image_token = "<image>"

    def __call__(self, text, images, return_tensors):
        (image,) = images
        pixels = torch.tensor(list(image.resize((16, 16)).convert("RGB").getdata())).view(16, 16, 3) / 127.5 - 1
        tokens = self.tokenizer([text.replace("<image>", 13 * "<image>")], return_tensors=return_tensors)
        return {
            **tokens,
            "image_pixel_values": pixels.permute(2, 0, 1).expand(1, 2, 3, 16, 16),
            "image_sizes": torch.tensor([[16, 16]]),
            "image_attention_mask": torch.ones(1, 2, 4, 4),
        }


def test_calibration_with_images_and_generation_from_one(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(phi4_multimodal(), source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 20, 24)]} for seed in range(3)]
    config = QuantConfig(group_size=32, components={"vision": "4bit"})
    result = api.quantize(source, out, config=config, calibration=samples, tokenizer=Processor(), samples=3)
    vision = [report for report in result.reports if "img_processor" in report.name]
    language = [report for report in result.reports if report.name.startswith("model.layers")]
    # The features of the last block but one are taken, so the last sees images and changes nothing.
    assert len(vision) == 3 * 6 and len(language) == 2 * 4
    assert all(report.tokens == 3 * 2 * 16 for report in vision)
    assert all(report.tokens == result.calibration.tokens for report in language)

    batch = Processor()("<image>what?", [noise_image(0, 20, 24)], "pt")
    model = load(out)
    with torch.no_grad():
        got, want = model(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]


def test_the_audio_encoder_is_quantized_on_sound(tmp_path):
    """Samples come as text and images; sound comes as ready batches."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(phi4_multimodal(), source)
    generator = torch.Generator().manual_seed(0)

    def heard(frames):
        """A sound of `frames` log-mel frames, eight of which become one token."""
        tokens = frames // 8
        ids = torch.tensor([[*[3] * tokens, 40, 41, 42]])
        sound = torch.randn(1, frames, 80, generator=generator)
        return {"input_ids": ids, "audio_input_features": sound, "audio_embed_sizes": torch.tensor([tokens])}

    data = CalibrationData(batches=(heard(32), heard(48)), source="noise", samples=2, tokens=4 + 6 + 2 * 3)
    config = QuantConfig(group_size=32, components={"audio": "4bit", "language": "keep"})
    result = api.quantize(source, out, config=config, calibration=data)
    assert result.reports and all(".audio_embed.encoder.encoders." in report.name for report in result.reports)
    assert all(report.tokens == 4 + 6 for report in result.reports)
    assert all(report.loss <= report.loss_rtn * 1.05 for report in result.reports)
    batch = heard(40)
    with torch.no_grad():
        got, want, original = (
            load(folder, fake_quant=fake)(**batch).logits
            for folder, fake in ((out, False), (out, True), (source, False))
        )
    assert float((got - want).norm() / want.norm()) < 1e-4
    assert 1e-4 < float((got - original).norm() / original.norm()) < 0.5
