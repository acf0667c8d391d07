"""Nemotron: norms of 1 + weight with a bias, and the square of ReLU."""

from dataclasses import replace

from transformers import NemotronConfig

from awq_core.testing import TINY_DECODER as TINY
from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_nemotron import NEMOTRON


class TestNemotron(ArchitectureConformance):
    plugin = "awq_plugin_nemotron"

    @staticmethod
    def configs():
        return {
            "nemotron": NemotronConfig(**TINY, head_dim=16),
            "biases": NemotronConfig(
                **{**TINY, "num_key_value_heads": 4}, head_dim=16, attention_bias=True, mlp_bias=True
            ),
            "wide-heads": NemotronConfig(**TINY, head_dim=32),
        }


def test_the_square_of_relu_needs_the_root():
    *others, down = NEMOTRON.scale_groups
    assert proof_error(NemotronConfig(**TINY), NEMOTRON, [*others, replace(down, degree=1)]) > 0.05


def test_the_norms_multiply_by_one_plus_weight():
    groups = [replace(group, norm_offset=0.0) for group in NEMOTRON.scale_groups]
    assert proof_error(NemotronConfig(**TINY), NEMOTRON, groups) > 0.02
