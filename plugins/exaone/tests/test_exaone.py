"""EXAONE 3, whose code cannot be fetched here, so the smallest stand-in with its module names takes its place; EXAONE 4
with its norms behind attention and MLP; the mixture."""

from dataclasses import replace
from typing import ClassVar

import pytest
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Exaone4Config,
    ExaoneMoeConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from awq_core.config import QuantConfig
from awq_core.hooks.manager import default_manager
from awq_core.planning import make_plan
from awq_core.quantization.proof import prove
from awq_core.skeleton import build_skeleton
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance

MIXTURE = {
    **TINY,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def rename(module, **names):
    """Give submodules other names. Properties of the classes below lead Llama's code from the old ones to these."""
    for old, new in names.items():
        module._modules[new] = module._modules.pop(old)


def known_as(name):
    return property(lambda self: getattr(self, name))


class ExaoneConfig(LlamaConfig):
    model_type = "exaone"


class ExaoneSelfAttention(LlamaAttention):
    o_proj = known_as("out_proj")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        rename(self, o_proj="out_proj")


class ExaoneAttention(LlamaAttention):
    """A shell around the attention proper."""

    def __init__(self, config, layer_idx):
        super(LlamaAttention, self).__init__()
        self.attention = ExaoneSelfAttention(config, layer_idx)

    def forward(self, hidden_states, **kwargs):
        return self.attention(hidden_states=hidden_states, **kwargs)


class ExaoneGatedMLP(LlamaMLP):
    """c_proj( act(c_fc_0 x) · c_fc_1 x )"""

    gate_proj, up_proj, down_proj = (known_as(name) for name in ("c_fc_0", "c_fc_1", "c_proj"))

    def __init__(self, config):
        super().__init__(config)
        rename(self, gate_proj="c_fc_0", up_proj="c_fc_1", down_proj="c_proj")


class ExaoneBlock(LlamaDecoderLayer):
    self_attn = known_as("attn")
    input_layernorm, post_attention_layernorm = known_as("ln_1"), known_as("ln_2")

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        rename(self, input_layernorm="ln_1", self_attn="attn", post_attention_layernorm="ln_2")
        self.attn, self.mlp = ExaoneAttention(config, layer_idx), ExaoneGatedMLP(config)


class ExaoneModel(LlamaModel):
    config_class = ExaoneConfig
    base_model_prefix = "transformer"
    embed_tokens, layers, norm = known_as("wte"), known_as("h"), known_as("ln_f")

    def __init__(self, config):
        super().__init__(config)
        rename(self, embed_tokens="wte", layers="h", norm="ln_f")
        for index in range(config.num_hidden_layers):
            self.h[index] = ExaoneBlock(config, index)


class ExaoneForCausalLM(LlamaForCausalLM):
    config_class = ExaoneConfig
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "transformer.wte.weight"}
    model = known_as("transformer")

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)
        self.transformer, self.vocab_size = ExaoneModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register("exaone", ExaoneConfig, exist_ok=True)
AutoModelForCausalLM.register(ExaoneConfig, ExaoneForCausalLM, exist_ok=True)


class TestExaone(ArchitectureConformance):
    plugin = "awq_plugin_exaone"

    @staticmethod
    def configs():
        return {
            "exaone": ExaoneConfig(**TINY),
            "exaone-tied": ExaoneConfig(**{**TINY, "num_key_value_heads": 4}, tie_word_embeddings=True),
            "exaone4": Exaone4Config(**TINY, sliding_window=4, sliding_window_pattern=2),
            "exaone4-multi-head": Exaone4Config(
                **{**TINY, "num_key_value_heads": 4}, sliding_window=None, layer_types=["full_attention"] * 2
            ),
            "exaone_moe": ExaoneMoeConfig(**MIXTURE, sliding_window=4, sliding_window_pattern=2),
        }


def changed(config, change):
    """The proof's error with `change` made to each group."""
    owner = default_manager().owner(config)
    arch = replace(owner.arch, scale_groups=tuple(change(group) for group in owner.arch.scale_groups))
    return prove(config, replace(owner, arch=arch), default_manager()).error


def test_the_gate_takes_up_no_scales():
    def change(group):
        return replace(group, prev="mlp.c_fc_0") if group.prev == "mlp.c_fc_1" else group

    assert changed(ExaoneConfig(**TINY), change) > 0.1


@pytest.mark.parametrize("reader", ["self_attn.q_proj", "mlp.gate_proj"])
def test_the_norms_of_exaone4_feed_no_linear(reader):
    norms = {"self_attn.q_proj": "post_feedforward_layernorm", "mlp.gate_proj": "post_attention_layernorm"}

    def change(group):
        return replace(group, prev=norms[reader]) if reader in group.layers else group

    assert changed(Exaone4Config(**TINY), change) > 0.1


def test_readers_of_the_residual_share_one_fate_without_scales():
    owner = default_manager().owner(Exaone4Config(**TINY))
    plan = make_plan(build_skeleton(Exaone4Config(**TINY)), owner, default_manager(), QuantConfig(group_size=32))
    assert [group.prev for group in plan.blocks[0].groups] == ["self_attn.v_proj", "mlp.up_proj"]
    assert len(plan.blocks[0].skipped) == 2 and all(one.quantize for one in plan.blocks[0].linears)
