"""OPT before and after its norms, Galactica, and what ReLU lets through."""

import pytest
from transformers import OPTConfig

from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_opt import FC1, FC2, OPT, QKV, VALUES

TINY = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
AFTER = {"do_layer_norm_before": False}
GALACTICA = {"activation_function": "gelu", "enable_bias": False}


class TestOPT(ArchitectureConformance):
    plugin = "awq_plugin_opt"

    @staticmethod
    def configs():
        return {
            "opt": OPTConfig(**TINY),
            "350m": OPTConfig(**{**TINY, "word_embed_proj_dim": 32}, **AFTER),
            "galactica": OPTConfig(**TINY, **GALACTICA),
            "norms-without-weights": OPTConfig(**TINY, layer_norm_elementwise_affine=False),
        }


@pytest.mark.parametrize(
    ("options", "group"),
    [(GALACTICA, FC2), (AFTER, QKV), (AFTER, FC1)],
    ids=["gelu", "norm after attention", "norm after the MLP"],
)
def test_groups_that_go(options, group):
    assert proof_error(OPTConfig(**TINY, **options), OPT, [VALUES, group]) > 0.05


def test_relu_passes_a_scale_on():
    assert proof_error(OPTConfig(**TINY), OPT, [FC2]) < 1e-4
