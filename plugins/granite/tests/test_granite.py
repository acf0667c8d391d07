"""Granite's blocks: dense, with windows, with stacked experts, with a shared MLP, and Mamba-2."""

from dataclasses import replace
from functools import partial

import pytest
from transformers import (
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    GraniteMoeSWAConfig,
    GraniteSWAConfig,
)

import awq_plugin_granite
from awq_core import api
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.config import QuantConfig
from awq_core.hooks.manager import default_manager
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing import ArchitectureConformance, proof_error, save_tiny
from awq_plugin_granite import MIXTURE

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 8}


def hybrid(**options):
    kinds = {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 96}
    return GraniteMoeHybridConfig(**{**TINY, **kinds, **MAMBA, **options})


class TestGranite(ArchitectureConformance):
    plugin = "awq_plugin_granite"

    @staticmethod
    def configs():
        return {
            "granite": GraniteConfig(**TINY),
            "granite-multi-head-biases": GraniteConfig(
                **{**TINY, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
            ),
            "granite_swa": GraniteSWAConfig(**TINY),
            "granitemoe": GraniteMoeConfig(**TINY, **MOE),
            "granitemoeshared": GraniteMoeSharedConfig(**TINY, **MOE, shared_intermediate_size=64),
            "granitemoe_swa": GraniteMoeSWAConfig(**TINY, **MOE, shared_intermediate_size=64),
            "granitemoehybrid": hybrid(**MOE),
            "granitemoehybrid-dense": hybrid(num_local_experts=0, num_experts_per_tok=0),
        }


@pytest.mark.parametrize(
    "config", [GraniteMoeConfig(**TINY, **MOE), GraniteMoeSharedConfig(**TINY, **MOE, shared_intermediate_size=64)]
)
def test_the_router_reads_what_the_experts_read(config):
    block = build_skeleton(config).get_submodule("model.layers.0")
    groups = awq_plugin_granite.awq_scale_groups(MIXTURE, None, block)
    wrong = [replace(group, compensate=()) for group in groups]
    assert error(config, groups) < 1e-4
    assert error(config, wrong) > 0.05


def test_of_the_shared_mlp_the_last_rows_are_up():
    config = GraniteMoeSharedConfig(**TINY, **MOE, shared_intermediate_size=64)
    norm, up_to_output = awq_plugin_granite.BOTH, awq_plugin_granite.UP_TO_OUTPUT
    assert error(config, [norm, up_to_output]) < 1e-4
    # Without the shared MLP among its readers the norm cannot be divided.
    assert error(config, [awq_plugin_granite.EXPERTS]) > 0.05


def error(config, groups):
    return proof_error(config, MIXTURE, groups, prepare=partial(awq_plugin_granite.awq_prepare_model, MIXTURE))


@pytest.mark.parametrize("config", [GraniteMoeConfig(**TINY, **MOE), hybrid(**MOE)])
def test_experts_are_taken_out_of_the_stacks_of_the_checkpoint(config, tmp_path):
    """On disk a layer's experts are two tensors; the result has three linears an expert, and the rest as it was."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config, source)
    moe = "model.layers.1.block_sparse_moe"
    with CheckpointReader(source) as before:
        assert before.shape(f"{moe}.input_linear.weight") == (4, 192, 64)
        api.quantize(source, out, config=QuantConfig(group_size=32, rounding="nearest", scale=False, clip="none"))
        model = load(out, fake_quant=True)
        with CheckpointReader(out) as after:
            experts = {name.rpartition(".")[0] for name in after.names if ".experts." in name and f"{moe}." in name}
            assert experts == {f"{moe}.experts.{expert}.{name}" for expert in range(4) for name in ("w1", "w2", "w3")}
            assert f"{moe}.router.layer.weight" in after
        for expert in range(4):
            gate, up = before.tensor(f"{moe}.input_linear.weight")[expert].chunk(2)
            down = before.tensor(f"{moe}.output_linear.weight")[expert]
            for name, want in (("w1", gate), ("w3", up), ("w2", down)):
                got = model.get_parameter(f"{moe}.experts.{expert}.{name}.weight")
                assert float((got - want).norm() / want.norm()) < 0.15  # four bits


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(), GraniteSWAConfig(), GraniteMoeConfig(), GraniteMoeSharedConfig(), GraniteMoeHybridConfig()],
)
def test_the_sizes_of_released_models_can_be_proved(config):
    """The proof runs on a narrow and shallow version of the configuration that the family's models have."""
    proof = prove(config, default_manager().owner(config), default_manager())
    assert proof.groups and proof.proved
