"""MiniCPM, whose code cannot be fetched here, so the smallest stand-in with its module names and its constants takes
its place; MiniCPM 3 with latent attention, with and without a latent query."""

from dataclasses import replace

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MiniCPM3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance

LATENT = {
    **TINY,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "dim_model_base": 32,
}


class MiniCPMConfig(LlamaConfig):
    model_type = "minicpm"
    scale_emb: float = 12.0
    dim_model_base: int = 32
    scale_depth: float = 1.4


class ScaledEmbedding(nn.Embedding):
    """MiniCPM multiplies in the model's forward; here the table does, which comes to the same."""

    factor = 1.0

    def forward(self, ids):
        return super().forward(ids) * self.factor


class DividedLinear(nn.Linear):
    """The head, on its input divided by hidden_size / dim_model_base."""

    divisor = 1.0

    def forward(self, x):
        return super().forward(x / self.divisor)


class MiniCPMDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.factor = config.scale_depth / config.num_hidden_layers**0.5

    def forward(self, hidden_states, **kwargs):
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + attended * self.factor
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)) * self.factor


class MiniCPMForCausalLM(LlamaForCausalLM):
    config_class = MiniCPMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.model.embed_tokens.factor = config.scale_emb
        self.lm_head = DividedLinear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.divisor = config.hidden_size / config.dim_model_base
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = MiniCPMDecoderLayer(config, index)
        self.post_init()


AutoConfig.register("minicpm", MiniCPMConfig, exist_ok=True)
AutoModelForCausalLM.register(MiniCPMConfig, MiniCPMForCausalLM, exist_ok=True)


class TestMiniCPM(ArchitectureConformance):
    plugin = "awq_plugin_minicpm"

    @staticmethod
    def configs():
        return {
            "minicpm": MiniCPMConfig(**TINY),
            "minicpm-multi-head-tied": MiniCPMConfig(**{**TINY, "num_key_value_heads": 4}, tie_word_embeddings=True),
            "minicpm3": MiniCPM3Config(**LATENT),
            "minicpm3-direct-query": MiniCPM3Config(**{**LATENT, "q_lora_rank": None}, attention_bias=True),
        }


def test_the_first_rows_of_kv_b_are_the_keys():
    """Taken for a linear that writes the values last, after all keys."""
    config = MiniCPM3Config(**LATENT)
    owner = default_manager().owner(config)
    groups = tuple(
        replace(group, prev_rows="last", head_dim="") if group.prev_rows == "kv_heads" else group
        for group in owner.arch.scale_groups
    )
    wrong = replace(owner, arch=replace(owner.arch, scale_groups=groups))
    assert prove(config, owner, default_manager()).proved
    assert prove(config, wrong, default_manager()).error > 0.1
