"""BLOOM, whose query, key and value go head by head, and whose norms may be the residual."""

from dataclasses import replace

from transformers import BloomConfig

from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_bloom import BLOOM, NORMS, VALUES

TINY = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
TINY |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class TestBloom(ArchitectureConformance):
    plugin = "awq_plugin_bloom"

    @staticmethod
    def configs():
        return {
            "bloom": BloomConfig(**TINY),
            "odd-heads-untied": BloomConfig(**{**TINY, "hidden_size": 96, "n_head": 3}, tie_word_embeddings=False),
            "residual-after-norm": BloomConfig(**TINY, apply_residual_connection_post_layernorm=True),
        }


def test_values_are_in_every_heads_part():
    last = replace(VALUES, prev_rows="last", head_dim="")
    assert proof_error(BloomConfig(**TINY), BLOOM, [*NORMS, last]) > 0.05


def test_a_norm_that_is_the_residual_takes_no_scales():
    config = BloomConfig(**TINY, apply_residual_connection_post_layernorm=True)
    for norm in NORMS:
        assert proof_error(config, BLOOM, [norm]) > 0.05
