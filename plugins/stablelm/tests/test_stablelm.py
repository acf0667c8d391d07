"""Both residual forms, with and without norms on query and key. The first releases bring code that cannot be fetched
here; a stand-in with the same module names takes its place."""

from dataclasses import replace

from transformers import AutoConfig, AutoModelForCausalLM, StableLmConfig, StableLmForCausalLM

from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_stablelm import ONE_NORM, PARALLEL, QKV, STABLELM

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


class EpochConfig(StableLmConfig):
    model_type = "stablelm_epoch"


class EpochForCausalLM(StableLmForCausalLM):
    config_class = EpochConfig


AutoConfig.register("stablelm_epoch", EpochConfig, exist_ok=True)
AutoModelForCausalLM.register(EpochConfig, EpochForCausalLM, exist_ok=True)


class TestStableLm(ArchitectureConformance):
    plugin = "awq_plugin_stablelm"

    @staticmethod
    def configs():
        return {
            "serial": StableLmConfig(**TINY, num_key_value_heads=2),
            "serial-multi-head-biases": StableLmConfig(
                **TINY, num_key_value_heads=4, use_qkv_bias=True, tie_word_embeddings=True
            ),
            "parallel": StableLmConfig(**TINY, num_key_value_heads=4, use_parallel_residual=True),
            "parallel-qk-norm": StableLmConfig(
                **TINY, num_key_value_heads=2, use_parallel_residual=True, qk_layernorm=True
            ),
            "epoch": EpochConfig(**TINY, num_key_value_heads=4),
            "serial-qk-norm": StableLmConfig(**TINY, num_key_value_heads=2, qk_layernorm=True),
        }


def test_a_parallel_mlp_left_out_fails_the_proof():
    """Query, key and value alone: the MLP still reads the norm that was divided."""
    config = StableLmConfig(**TINY, num_key_value_heads=2, use_parallel_residual=True)
    attention = replace(ONE_NORM, layers=QKV)
    assert proof_error(config, STABLELM, (attention, *PARALLEL[1:])) > 0.05
    assert proof_error(config, STABLELM, PARALLEL) < 1e-4


def test_the_size_of_a_released_model_can_be_proved():
    """The proof runs on a narrow and shallow version of the configuration that the family's models have."""
    manager = default_manager()
    for parallel in (False, True):
        config = StableLmConfig(num_key_value_heads=8, use_parallel_residual=parallel, qk_layernorm=parallel)
        proof = prove(config, manager.owner(config), manager)
        assert proof.groups == 2 * (3 if parallel else 4) and proof.proved
