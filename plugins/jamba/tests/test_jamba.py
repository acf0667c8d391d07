"""Hybrid stacks: attention and Mamba blocks, dense and mixture."""

from dataclasses import replace

from transformers import BambaConfig, JambaConfig

from awq_core.modules import unstack_experts
from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_jamba import BAMBA, JAMBA

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Blocks 0 and 2 are Mamba, 1 and 3 attention; 2 and 3 are mixtures.
ORDER = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 2}
MAMBA1 = {"mamba_dt_rank": 8, "mamba_d_state": 8}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}


def jamba(**options):
    sizes = {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}
    return JambaConfig(**{**TINY, **MAMBA1, **ORDER, **sizes, **options})


def bamba(**options):
    return BambaConfig(**{**TINY, **MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1], **options})


class TestJamba(ArchitectureConformance):
    plugin = "awq_plugin_jamba"

    @staticmethod
    def configs():
        return {
            "jamba": jamba(),
            "jamba-dense": jamba(num_hidden_layers=2, num_experts=1, num_key_value_heads=4),
            "bamba": bamba(),
            "bamba-groups-biases": bamba(mamba_n_groups=2, mamba_proj_bias=True, attention_bias=True, mlp_bias=True),
        }


def unstacked(model):
    return unstack_experts(model, "feed_forward.experts")


def test_the_router_reads_the_norm_of_the_experts():
    groups = [replace(group, compensate=()) for group in JAMBA.scale_groups]
    assert proof_error(jamba(), JAMBA, JAMBA.scale_groups, prepare=unstacked) < 1e-4
    assert proof_error(jamba(), JAMBA, groups, prepare=unstacked) > 0.01


def test_no_scale_passes_from_the_mixers_input_to_its_output():
    norm = next(group for group in BAMBA.scale_groups if group.prev == "mamba.norm")
    wrong = replace(norm, prev="mamba.in_proj", prev_rows="last")
    groups = [wrong if group is norm else group for group in BAMBA.scale_groups]
    assert proof_error(bamba(), BAMBA, groups) > 0.01
