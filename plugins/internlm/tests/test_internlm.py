"""InternLM 2, whose code cannot be fetched here, so the smallest stand-in with its module names and its interleaved qkv
takes its place; InternLM 3; InternVL on two language models."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, apply_rotary_pos_emb

from awq_core import api
from awq_core.config import QuantConfig
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance, noise_image, save_tiny, tiny_tokenizer

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": (16, 16),
    "patch_size": (4, 4),
}
IMAGE = 2  # id of "<image>" in the kit's tiny tokenizer
TOKENS = 4  # of one image: 4 x 4 patches, four of which become one token


def rename(module, **names):
    """Give submodules other names. Properties of the classes below lead Llama's code from the old ones to these."""
    for old, new in names.items():
        module._modules[new] = module._modules.pop(old)


def known_as(name):
    return property(lambda self: getattr(self, name))


class InternLM2Config(LlamaConfig):
    model_type = "internlm2"


class InternLM2Attention(nn.Module):
    """wqkv is (kv heads) x (queries that share one, key, value) x head_dim."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.kv, self.head_dim = config.num_key_value_heads, config.head_dim
        self.groups = config.num_attention_heads // self.kv
        bias = config.attention_bias
        self.wqkv = nn.Linear(config.hidden_size, self.kv * (self.groups + 2) * self.head_dim, bias=bias)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        batch, tokens, _ = hidden_states.shape
        fused = self.wqkv(hidden_states).view(batch, tokens, self.kv, self.groups + 2, self.head_dim)
        q = fused[..., : self.groups, :].reshape(batch, tokens, -1, self.head_dim).transpose(1, 2)
        k, v = (fused[..., index, :].transpose(1, 2) for index in (-2, -1))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (one.repeat_interleave(self.groups, dim=1) for one in (k, v))
        causal = attention_mask is None and tokens > 1
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        return self.wo(out.transpose(1, 2).reshape(batch, tokens, -1)), None


class InternLM2MLP(LlamaMLP):
    """w2( act(w1 x) · w3 x )"""

    gate_proj, up_proj, down_proj = known_as("w1"), known_as("w3"), known_as("w2")

    def __init__(self, config):
        super().__init__(config)
        rename(self, gate_proj="w1", up_proj="w3", down_proj="w2")


class InternLM2DecoderLayer(LlamaDecoderLayer):
    self_attn, mlp = known_as("attention"), known_as("feed_forward")
    input_layernorm, post_attention_layernorm = known_as("attention_norm"), known_as("ffn_norm")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        rename(self, self_attn="attention", mlp="feed_forward")
        rename(self, input_layernorm="attention_norm", post_attention_layernorm="ffn_norm")
        self.attention, self.feed_forward = InternLM2Attention(config, layer_idx), InternLM2MLP(config)


class InternLM2Model(LlamaModel):
    config_class = InternLM2Config
    embed_tokens = known_as("tok_embeddings")

    def __init__(self, config):
        super().__init__(config)
        rename(self, embed_tokens="tok_embeddings")
        for index in range(config.num_hidden_layers):
            self.layers[index] = InternLM2DecoderLayer(config, index)


class InternLM2ForCausalLM(LlamaForCausalLM):
    config_class = InternLM2Config
    _tied_weights_keys: ClassVar = {"output.weight": "model.tok_embeddings.weight"}
    lm_head = known_as("output")

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.model, self.vocab_size = InternLM2Model(config), config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def get_output_embeddings(self):
        return self.output


AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)
AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)


def internlm3(**options):
    return AutoConfig.for_model("internlm3", **{**TINY, "head_dim": 16, **options})


def internvl(text):
    vision = {**TOWER, "model_type": "internvl_vision", "use_qk_norm": True}
    return InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=TOKENS)


class TestInternLM(ArchitectureConformance):
    plugin = "awq_plugin_internlm"

    @staticmethod
    def configs():
        return {
            "internlm2": InternLM2Config(**TINY),
            "internlm2-multi-head-biases": InternLM2Config(**{**TINY, "num_key_value_heads": 4}, attention_bias=True),
            "internlm2-one-head-tied": InternLM2Config(**{**TINY, "num_key_value_heads": 1}, tie_word_embeddings=True),
            "internlm3": internlm3(attention_bias=True, mlp_bias=True),
            "internvl-qwen": internvl(Qwen2Config(**TINY)),
            "internvl-llama": internvl(LlamaConfig(**TINY)),
        }


def changed(change):
    """The proof's error with `change` made to each of InternLM 2's groups."""
    config = InternLM2Config(**TINY)
    owner = default_manager().owner(config)
    arch = replace(owner.arch, scale_groups=tuple(change(group) for group in owner.arch.scale_groups))
    return prove(config, replace(owner, arch=arch), default_manager()).error


def test_the_last_rows_of_wqkv_are_not_the_values():
    assert changed(lambda group: replace(group, prev_rows="last") if group.head_dim else group) > 0.1


def test_w1_takes_up_no_scales():
    def change(group):
        return replace(group, prev="feed_forward.w1") if group.prev == "feed_forward.w3" else group

    assert changed(change) > 0.1


class Processor:
    """InternVL's image preprocessing and placeholder expansion. transformers' own processor class also wants
    torchvision, for videos, and cannot be built without it."""

    image_token = "<image>"

    def __init__(self):
        self.tokenizer = tiny_tokenizer()
        side = {"height": 16, "width": 16}
        self.images = GotOcr2ImageProcessorPil(size=side, crop_to_patches=False)

    def __call__(self, text, images, return_tensors):
        pixels = self.images(images, return_tensors=return_tensors)["pixel_values"]
        prompt = text.replace(self.image_token, self.image_token * TOKENS)
        return {**self.tokenizer(prompt, return_tensors=return_tensors), "pixel_values": pixels}


@pytest.mark.parametrize("text", [Qwen2Config(**TINY), LlamaConfig(**TINY)], ids=["qwen", "llama"])
def test_calibration_with_images_and_generation_from_one(text, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(internvl(text), source)
    samples = [{"text": f"number {seed}", "images": [noise_image(seed, 16, 24)]} for seed in range(3)]
    settings = QuantConfig(group_size=32, components={"vision": "4bit", "projector": "4bit"})
    result = api.quantize(source, out, config=settings, calibration=samples, tokenizer=Processor(), samples=3)
    vision = [report for report in result.reports if ".vision_tower." in report.name]
    assert len(vision) == 2 * 6 and all(report.tokens == 3 * 17 for report in vision)  # patches and the class token
    projector = [report for report in result.reports if "projector" in report.name]
    assert len(projector) == 2 and all(report.tokens == 3 * TOKENS for report in projector)
    language = [report for report in result.reports if ".language_model." in report.name]
    assert len(language) == 14 and all(report.tokens == result.calibration.tokens for report in language)

    batch = Processor()("<image>what is it?", [noise_image(9, 16, 24)], "pt")
    with torch.no_grad():
        got, want = load(out)(**batch).logits, load(out, fake_quant=True)(**batch).logits
    assert float((got - want).norm() / want.norm()) < 1e-4
    made = load(out).generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > batch["input_ids"].shape[1]
