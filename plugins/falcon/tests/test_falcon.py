"""Falcon's three forms, every way of sharing value heads, and Falcon-H1. The first releases (`RefinedWeb`) bring code
that cannot be fetched here; their module names are Falcon's, so its model class stands in for them."""

from dataclasses import replace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM, FalconH1Config

import awq_plugin_falcon
from awq_core.hooks.manager import PluginManager
from awq_core.quantization.proof import prove, shrunk, tiny_model
from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_falcon import FALCON, FALCON_H1, ONE_NORM

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
H1 = {**TINY, "intermediate_size": 96, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8}
H1 |= {"mamba_d_state": 16, "mamba_chunk_size": 8, "mlp_multipliers": [0.7, 0.4], "key_multiplier": 0.3}


class RefinedWebConfig(FalconConfig):
    model_type = "RefinedWebModel"


class RefinedWebForCausalLM(FalconForCausalLM):
    config_class = RefinedWebConfig


AutoConfig.register("RefinedWebModel", RefinedWebConfig, exist_ok=True)
AutoModelForCausalLM.register(RefinedWebConfig, RefinedWebForCausalLM, exist_ok=True)


def falcon(**options):
    return FalconConfig(**TINY, ffn_hidden_size=96, **options)


def new_decoder(**options):
    return falcon(new_decoder_architecture=True, **options)


class TestFalcon(ArchitectureConformance):
    plugin = "awq_plugin_falcon"

    @staticmethod
    def configs():
        return {
            "7b": falcon(multi_query=True, parallel_attn=True),
            "40b": new_decoder(num_kv_heads=2),
            "11b": new_decoder(num_kv_heads=2, num_ln_in_parallel_attn=1, tie_word_embeddings=False),
            "rw": falcon(multi_query=False, parallel_attn=False, alibi=True, bias=True),
            "parallel-multi-head": falcon(multi_query=False, parallel_attn=True),
            "refined-web": RefinedWebConfig(**TINY, multi_query=True, parallel_attn=True),
            "h1": FalconH1Config(**H1),
            "h1-norm": FalconH1Config(**{**H1, "mamba_rms_norm": True, "attention_in_multiplier": 0.5}),
        }


def test_the_mlp_reads_the_norm_of_the_attention():
    """Parallel attention, described as if the MLP read something else. Shapes are fine; the function is not."""
    norm, values = ONE_NORM
    config = falcon(multi_query=True)
    assert proof_error(config, FALCON, [norm, values]) < 1e-4
    assert proof_error(config, FALCON, [replace(norm, layers=norm.layers[:1]), values]) > 0.1


def test_the_values_are_in_every_heads_part():
    """The last rows of the whole of `query_key_value` are the values only where there is one key-value head."""
    norm, values = ONE_NORM
    last = replace(values, prev_rows="last")
    assert proof_error(falcon(multi_query=True), FALCON, [norm, last]) < 1e-4
    assert proof_error(falcon(multi_query=False), FALCON, [norm, last]) > 0.05
    assert proof_error(new_decoder(num_kv_heads=2, num_ln_in_parallel_attn=1), FALCON, [norm, last]) > 0.05


def test_the_mamba_mixer_reads_the_norm_of_the_attention():
    norm, *others = FALCON_H1.scale_groups
    without = replace(norm, layers=norm.layers[:3])
    assert proof_error(FalconH1Config(**H1), FALCON_H1, [without, *others]) > 0.1


PUBLISHED = {
    "7b": {"hidden_size": 4544, "num_attention_heads": 71},
    "40b": {
        "hidden_size": 8192,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "num_hidden_layers": 60,
        "new_decoder_architecture": True,
    },
    "rw-1b": {
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_proved_small(name):
    config = FalconConfig(**PUBLISHED[name])
    manager = PluginManager(allow=())
    manager.register(awq_plugin_falcon, "falcon")
    model = tiny_model(config, manager.owner(config), manager)
    assert model.config.hidden_size == next(shrunk(config)).hidden_size <= 512
    assert prove(config, manager.owner(config), manager).proved
