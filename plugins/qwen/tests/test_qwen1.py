"""Qwen 1, whose code cannot be fetched here, so the smallest stand-in with its module names and its wiring takes its
place."""

from dataclasses import replace
from typing import ClassVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.testing import ArchitectureConformance

TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,  # both halves of the MLP
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def rename(module, **names):
    """Give submodules other names. Properties of the classes below lead Llama's code from the old ones to these."""
    for old, new in names.items():
        module._modules[new] = module._modules.pop(old)


def known_as(name):
    return property(lambda self: getattr(self, name))


class QWenConfig(LlamaConfig):
    model_type = "qwen"


class QWenAttention(nn.Module):
    """c_attn is query, key, value, in this order, with biases."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        batch, tokens, width = hidden_states.shape
        parts = self.c_attn(hidden_states).split(width, dim=2)
        q, k, v = (part.view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2) for part in parts)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        causal = attention_mask is None and tokens > 1
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=causal)
        return self.c_proj(out.transpose(1, 2).reshape(batch, tokens, width)), None


class QWenMLP(nn.Module):
    """c_proj( w1 x · silu(w2 x) )"""

    def __init__(self, config):
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=False)
        self.w2 = nn.Linear(config.hidden_size, half, bias=False)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QWenBlock(LlamaDecoderLayer):
    self_attn = known_as("attn")
    input_layernorm, post_attention_layernorm = known_as("ln_1"), known_as("ln_2")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        rename(self, input_layernorm="ln_1", self_attn="attn", post_attention_layernorm="ln_2")
        self.attn, self.mlp = QWenAttention(config, layer_idx), QWenMLP(config)


class QWenModel(LlamaModel):
    config_class = QWenConfig
    embed_tokens, layers, norm = known_as("wte"), known_as("h"), known_as("ln_f")

    def __init__(self, config):
        super().__init__(config)
        rename(self, embed_tokens="wte", layers="h", norm="ln_f")
        for index in range(config.num_hidden_layers):
            self.h[index] = QWenBlock(config, index)


class QWenLMHeadModel(LlamaForCausalLM):
    config_class = QWenConfig
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}
    model = known_as("transformer")

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.transformer, self.vocab_size = QWenModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("qwen", QWenConfig, exist_ok=True)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel, exist_ok=True)


class TestQwen1(ArchitectureConformance):
    plugin = "awq_plugin_qwen"

    @staticmethod
    def configs():
        return {"qwen": QWenConfig(**TINY)}


def test_w2_is_the_gate_and_takes_up_no_scales():
    config = QWenConfig(**TINY)
    owner = default_manager().owner(config)
    groups = tuple(
        replace(group, prev="mlp.w2") if group.prev == "mlp.w1" else group for group in owner.arch.scale_groups
    )
    wrong = replace(owner, arch=replace(owner.arch, scale_groups=groups))
    assert prove(config, wrong, default_manager()).error > 0.1
