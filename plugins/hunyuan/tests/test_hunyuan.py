"""Hunyuan, dense and mixture: grouped-query and multi-head, biases, tied embeddings."""

from dataclasses import replace

import pytest
from transformers import HunYuanDenseV1Config, HunYuanMoEV1Config

from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.testing import TINY_DECODER, ArchitectureConformance

TINY = {**TINY_DECODER, "head_dim": 16}
MULTI_HEAD = {**TINY, "num_key_value_heads": 4}
MOE = {**TINY, "intermediate_size": 64, "num_experts": 4, "moe_topk": 2}


class TestHunyuan(ArchitectureConformance):
    plugin = "awq_plugin_hunyuan"

    @staticmethod
    def configs():
        return {
            "dense": HunYuanDenseV1Config(**TINY),
            "dense-biases-tied": HunYuanDenseV1Config(**MULTI_HEAD, attention_bias=True, tie_word_embeddings=True),
            "mixture": HunYuanMoEV1Config(**MOE),
            "mixture-uneven": HunYuanMoEV1Config(**{**MOE, "moe_topk": [1, 2]}),
        }


@pytest.mark.parametrize("left_out", ["mlp.gate.wg", "mlp.shared_mlp.gate_proj"])
def test_every_reader_of_the_second_norm_is_multiplied(left_out):
    config = HunYuanMoEV1Config(**MOE)
    owner = default_manager().owner(config)

    def without(names):
        return tuple(name for name in names if name != left_out)

    groups = tuple(
        replace(group, layers=without(group.layers), compensate=without(group.compensate))
        for group in owner.arch.scale_groups
    )
    arch = replace(owner.arch, scale_groups=groups)
    assert prove(config, replace(owner, arch=arch), default_manager()).error > 0.05
