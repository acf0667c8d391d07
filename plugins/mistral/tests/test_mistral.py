"""Dense models with sliding windows, and Mixtral, whose router must be compensated."""

import torch
from transformers import MinistralConfig, MistralConfig, MixtralConfig

import awq_plugin_mistral
from awq_core.hooks import Architecture, hookimpl, presets
from awq_core.hooks.manager import PluginManager
from awq_core.quantization.proof import prove
from awq_core.skeleton import build_skeleton
from awq_core.testing import ArchitectureConformance
from awq_core.testing.tiny import tiny_weights
from awq_plugin_mistral import LANGUAGE

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def mixtral(**options):
    return MixtralConfig(**{**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, **options})


class TestMistral(ArchitectureConformance):
    plugin = "awq_plugin_mistral"

    @staticmethod
    def configs():
        return {
            "mistral": MistralConfig(**TINY, sliding_window=8),
            "mistral-multi-head": MistralConfig(**{**TINY, "num_key_value_heads": 4}, sliding_window=None),
            "ministral": MinistralConfig(**TINY),
            "mixtral": mixtral(),
            "mixtral-multi-head": mixtral(num_key_value_heads=4, num_local_experts=3),
        }


def test_unstacked_experts_compute_what_the_stack_computes():
    config = mixtral()
    stacked, unstacked = tiny_weights(config, seed=3), tiny_weights(config, seed=3)
    manager = PluginManager()
    manager.register(awq_plugin_mistral, "mistral")
    assert manager.prepare_model(manager.owner(config), unstacked)
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(unstacked(input_ids=ids).logits, stacked(input_ids=ids).logits)
    assert isinstance(unstacked.get_submodule("model.layers.0.mlp.experts.2.w3"), torch.nn.Linear)


def test_a_router_left_out_fails_the_proof():
    """AutoAWQ's Mixtral: every expert listed, the router forgotten. Shapes are fine; the function is not."""
    groups = presets.moe_mlp(gate="w1", up="w3", down="w2")
    forgotten = groups[0].__class__(prev=groups[0].prev, layers=groups[0].layers)
    arch = Architecture(
        family="broken",
        model_types=("mixtral",),
        stacks=(LANGUAGE,),
        scale_groups=(*presets.attention(), forgotten, groups[1]),
    )

    class Broken:
        @hookimpl
        def awq_architectures(self):
            return (arch,)

        @hookimpl
        def awq_prepare_model(self, arch, model):
            from awq_core.modules import unstack_experts

            return unstack_experts(model, "mlp.experts", ("w1", "w3", "w2"))

    manager = PluginManager()
    manager.register(Broken(), "broken")
    config = mixtral()
    assert prove(config, manager.owner(config), manager).error > 0.05


def test_only_mixtral_is_prepared():
    dense = build_skeleton(MistralConfig(**TINY))
    manager = PluginManager()
    manager.register(awq_plugin_mistral, "mistral")
    assert not manager.prepare_model(manager.owner(dense.config), dense)
