"""ERNIE 4.5: biases, tied embeddings, mixtures among dense layers, with and without shared experts."""

from dataclasses import replace

import pytest
from transformers import Ernie4_5_MoeConfig, Ernie4_5Config

from awq_core.hooks import presets
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance

MOE = {**TINY, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}


class TestErnie(ArchitectureConformance):
    plugin = "awq_plugin_ernie"

    @staticmethod
    def configs():
        return {
            "dense": Ernie4_5Config(**TINY, head_dim=16),
            "dense-biases": Ernie4_5Config(**{**TINY, "num_key_value_heads": 4}, head_dim=16, use_bias=True),
            "mixture": Ernie4_5_MoeConfig(**MOE, moe_num_shared_experts=2, moe_layer_start_index=1),
            "mixture-untied": Ernie4_5_MoeConfig(
                **MOE, moe_num_shared_experts=0, moe_layer_start_index=0, tie_word_embeddings=False
            ),
            "mixture-before-dense": Ernie4_5_MoeConfig(
                **MOE, moe_num_shared_experts=1, moe_layer_start_index=0, moe_layer_end_index=0, use_bias=True
            ),
        }


@pytest.mark.parametrize("left_out", ["mlp.gate", "mlp.shared_experts.up_proj"])
def test_every_reader_of_the_second_norm_is_multiplied(left_out, monkeypatch):
    right = presets.moe_mlp

    def wrong(**options):
        norm, *others = right(**options)
        layers, compensate = (tuple(n for n in names if n != left_out) for names in (norm.layers, norm.compensate))
        return (replace(norm, layers=layers, compensate=compensate), *others)

    monkeypatch.setattr(presets, "moe_mlp", wrong)
    config = Ernie4_5_MoeConfig(**MOE, moe_num_shared_experts=1, moe_layer_start_index=0)
    assert prove(config, default_manager().owner(config), default_manager()).error > 0.05
