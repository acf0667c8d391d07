"""Norms without weight, norms behind, clamped values, experts."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import FlexOlmoConfig, Olmo2Config, Olmo3Config, OlmoConfig, OlmoeConfig

import awq_plugin_olmo
from awq_core.config import QuantConfig
from awq_core.hooks.manager import default_manager
from awq_core.planning import make_plan
from awq_core.quantization.proof import prove
from awq_core.skeleton import build_skeleton
from awq_core.testing import TINY_DECODER, ArchitectureConformance, proof_error
from awq_core.testing.tiny import tiny_weights

TINY = {**TINY_DECODER, "pad_token_id": 0}
MULTI_HEAD = {**TINY, "num_key_value_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
CLAMP = {"clip_qkv": 0.3}  # narrow enough to be met


class TestOlmo(ArchitectureConformance):
    plugin = "awq_plugin_olmo"

    @staticmethod
    def configs():
        return {
            "olmo": OlmoConfig(**TINY),
            "olmo-multi-head-clamped": OlmoConfig(**MULTI_HEAD, **CLAMP),
            "olmo2": Olmo2Config(**TINY),
            "olmo2-multi-head-biases": Olmo2Config(**MULTI_HEAD, attention_bias=True),
            "olmo3": Olmo3Config(**TINY, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
            "olmoe": OlmoeConfig(**TINY, **MOE),
            "olmoe-multi-head-clamped": OlmoeConfig(**MULTI_HEAD, **MOE, **CLAMP),
            "flex_olmo": FlexOlmoConfig(**TINY, **MOE),
        }


def plan(config):
    manager = default_manager()
    owner, skeleton = manager.owner(config), build_skeleton(config)
    manager.prepare_model(owner, skeleton)
    return make_plan(skeleton, owner, manager, QuantConfig(group_size=32))


def wrong_groups(config, groups):
    """The error of the proof with other groups for every block of the model."""
    arch = default_manager().owner(config).arch
    return proof_error(config, arch, groups, prepare=partial(awq_plugin_olmo.awq_prepare_model, arch))


@pytest.mark.parametrize("config", [OlmoConfig(**TINY, **CLAMP), OlmoeConfig(**TINY, **MOE, **CLAMP)])
def test_a_clamp_does_not_commute_with_a_scale(config):
    groups = default_manager().owner(config).arch.scale_groups
    assert awq_plugin_olmo.V_TO_O in groups
    assert wrong_groups(config, groups) > 0.05
    assert not any("v_proj" in group.prev for block in plan(config).blocks for group in block.groups)


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        (OlmoConfig(**TINY), {"self_attn.v_proj", "mlp.up_proj"}),
        (Olmo2Config(**TINY), {"self_attn.v_proj", "mlp.up_proj"}),
        (
            OlmoeConfig(**TINY, **MOE),
            {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm"}
            | {f"mlp.experts.{expert}.up_proj" for expert in range(4)},
        ),
    ],
    ids=["olmo", "olmo2", "olmoe"],
)
def test_what_can_be_scaled(config, scaled):
    for block in plan(config).blocks:
        assert {group.prev for group in block.groups} == scaled


@pytest.mark.parametrize("config", [OlmoConfig(**TINY), Olmo2Config(**TINY), Olmo3Config(**TINY)])
def test_query_and_key_without_scales_are_not_clipped_and_stay_with_value(config):
    for block in plan(config).blocks:
        clipped = {block.local(linear): linear.clip for linear in block.linears}
        assert not clipped["self_attn.q_proj"] and not clipped["self_attn.k_proj"] and clipped["self_attn.v_proj"]
        assert ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") in [skip.layers for skip in block.skipped]


def test_a_norm_behind_attention_is_not_one_before_the_mlp():
    """OLMo 2 has a norm of the name that Llama's MLP reads; here it stands behind attention."""
    config = Olmo2Config(**TINY)
    assert wrong_groups(config, (awq_plugin_olmo.READ_TO_GATE_UP,)) > 0.05


def test_the_router_reads_what_the_experts_read():
    config = OlmoeConfig(**TINY, **MOE)
    alone = replace(awq_plugin_olmo.READ_TO_EXPERTS, compensate=())
    assert wrong_groups(config, (alone,)) > 0.05


@pytest.mark.parametrize("config", [OlmoeConfig(**TINY, **MOE), FlexOlmoConfig(**TINY, **MOE)])
def test_unstacked_experts_compute_what_the_stack_computes(config):
    stacked, unstacked = tiny_weights(config, seed=3), tiny_weights(config, seed=3)
    assert default_manager().prepare_model(default_manager().owner(config), unstacked)
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(unstacked(input_ids=ids).logits, stacked(input_ids=ids).logits)


@pytest.mark.parametrize("config", [OlmoConfig(), Olmo2Config(), Olmo3Config(), OlmoeConfig(), FlexOlmoConfig()])
def test_the_sizes_of_released_models_can_be_proved(config):
    """The proof runs on a narrow and shallow version of the configuration that the family's models have."""
    proof = prove(config, default_manager().owner(config), default_manager())
    assert proof.groups and proof.proved
