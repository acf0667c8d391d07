"""Llama's block: multi-head and grouped-query, with and without biases. Aquila's and Yi's first releases bring code
that cannot be fetched here, so the smallest stand-ins with their module names take its place."""

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, SmolLM3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

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


class AquilaConfig(LlamaConfig):
    model_type = "aquila"


class AquilaForCausalLM(LlamaForCausalLM):
    config_class = AquilaConfig


class YiConfig(LlamaConfig):
    model_type = "Yi"


class YiDecoderLayer(LlamaDecoderLayer):
    """Llama's layer with the norms named `ln1` and `ln2`, as Yi's own modelling file did."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.ln1, self.ln2 = self.input_layernorm, self.post_attention_layernorm
        del self.input_layernorm, self.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.self_attn(self.ln1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln2(hidden_states))


class YiForCausalLM(LlamaForCausalLM):
    config_class = YiConfig

    def __init__(self, config):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.model.layers[index] = YiDecoderLayer(config, index)
        self.post_init()


for config_class, model_class in ((AquilaConfig, AquilaForCausalLM), (YiConfig, YiForCausalLM)):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


class TestLlama(ArchitectureConformance):
    plugin = "awq_plugin_llama"

    @staticmethod
    def configs():
        return {
            "grouped-query": LlamaConfig(**TINY, num_key_value_heads=2),
            "multi-head-tied": LlamaConfig(**TINY, num_key_value_heads=4, tie_word_embeddings=True),
            "biases": LlamaConfig(**TINY, num_key_value_heads=4, attention_bias=True, mlp_bias=True),
            "smollm3": SmolLM3Config(**TINY, num_key_value_heads=2),
            "aquila": AquilaConfig(**TINY, num_key_value_heads=2),
            "yi": YiConfig(**TINY, num_key_value_heads=2),
        }
