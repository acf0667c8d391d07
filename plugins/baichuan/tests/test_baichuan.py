"""Baichuan, whose code cannot be fetched here, so the smallest stand-ins with its module names take its place: the 7B,
which rotates query and key; the 13B, with ALiBi; Baichuan 2's head, which normalises its rows."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.testing import ArchitectureConformance

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


class BaichuanConfig(LlamaConfig):
    """`alibi` and `normalise` stand for the classes that the 13B and Baichuan 2 have of their own."""

    model_type = "baichuan"
    alibi: bool = False
    normalise: bool = False


class BaichuanAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.alibi = layer_idx, config.alibi
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        batch, tokens, width = hidden_states.shape
        fused = self.W_pack(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = fused.permute(2, 0, 3, 1, 4)
        if not self.alibi:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        keys = torch.arange(k.shape[2])
        distance = keys[None] - keys[-tokens:, None]
        scores = q @ k.mT / self.head_dim**0.5
        if self.alibi:
            slopes = 2.0 ** -(8 * torch.arange(1, self.num_heads + 1) / self.num_heads)
            scores = scores + (slopes[:, None, None] * distance).to(scores.dtype)
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(distance > 0, lowest)
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            scores = scores.masked_fill(~allowed[..., : k.shape[2]], lowest)
        out = scores.softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, width)), None


class NormHead(nn.Module):
    """Baichuan 2's head: rows of length one."""

    def __init__(self, width, vocabulary):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width).normal_())

    def forward(self, x):
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


class BaichuanForCausalLM(LlamaForCausalLM):
    config_class = BaichuanConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = BaichuanAttention(config, index)
        if config.normalise:
            self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()


AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)


class TestBaichuan(ArchitectureConformance):
    plugin = "awq_plugin_baichuan"

    @staticmethod
    def configs():
        return {
            "7b": BaichuanConfig(**TINY),
            "13b": BaichuanConfig(**TINY, alibi=True),
            "baichuan2-7b": BaichuanConfig(**TINY, normalise=True),
        }


@pytest.mark.parametrize("rows", ["heads", "kv_heads"])
def test_W_pack_does_not_go_head_by_head(rows):
    config = BaichuanConfig(**TINY)
    owner = default_manager().owner(config)
    groups = tuple(
        replace(group, prev_rows=rows, head_dim="self_attn.head_dim") if group.prev_rows == "last" else group
        for group in owner.arch.scale_groups
    )
    wrong = replace(owner, arch=replace(owner.arch, scale_groups=groups))
    assert prove(config, wrong, default_manager()).error > 0.1
