"""DeepSeek V2 to V4: latent attention with and without a latent query, biases, dense layers before mixtures, shared
experts, the indexer, and what V4 puts in their place."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV3Config, DeepseekV4Config, DeepseekV32Config

from awq_core import api
from awq_core.config import QuantConfig
from awq_core.hooks import ScaleGroup
from awq_core.hooks.manager import default_manager
from awq_core.planning import make_plan
from awq_core.quantization.fold import apply_to_block
from awq_core.quantization.proof import prove, tiny_model
from awq_core.scale_groups import resolve_groups
from awq_core.skeleton import build_skeleton
from awq_core.testing import ArchitectureConformance, save_tiny

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPS = {"n_group": 2, "topk_group": 1}


def v3(**options):
    return DeepseekV3Config(**{**TINY, **GROUPS, **options})


def v32():
    return DeepseekV32Config(**TINY, **GROUPS, index_topk=6, index_head_dim=16, index_n_heads=2)


def v4(**options):
    kinds = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
    return DeepseekV4Config(
        hidden_size=64,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=32,
        n_routed_experts=6,
        num_experts_per_tok=2,
        layer_types=list(kinds),
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={kinds[1]: 2, kinds[2]: 4},
        hc_mult=2,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=2,
        vocab_size=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **options,
    )


class TestDeepseek(ArchitectureConformance):
    plugin = "awq_plugin_deepseek"

    @staticmethod
    def configs():
        lite = {"q_lora_rank": None, "n_shared_experts": 2, "qk_nope_head_dim": 16}
        return {
            "v2": DeepseekV2Config(**TINY, **GROUPS, topk_method="group_limited_greedy"),
            "v2-lite": DeepseekV2Config(**{**TINY, **lite}),
            "v3": v3(),
            "v3-biases-tied": v3(attention_bias=True, tie_word_embeddings=True, rope_interleave=False),
            "v32": v32(),
            "v4": v4(),
        }


def wrong(config, change):
    """The proof's error after `change`, which returns a group, or None to leave it out, for each."""
    owner = default_manager().owner(config)
    groups = tuple(new for group in owner.arch.scale_groups if (new := change(group)) is not None)
    arch = replace(owner.arch, scale_groups=groups)
    return prove(config, replace(owner, arch=arch), default_manager()).error


def without(name):
    return lambda group: replace(group, compensate=tuple(one for one in group.compensate if one != name))


@pytest.mark.parametrize(
    ("config", "name"),
    [(v3(), "mlp.gate"), (v32(), "self_attn.indexer.wk"), (v32(), "self_attn.indexer.wq_b")],
    ids=["router", "indexer key", "indexer query"],
)
def test_a_reader_that_is_not_compensated_changes_the_function(config, name):
    assert wrong(config, without(name)) > 0.05


def test_a_latent_projection_that_is_left_out_changes_the_function():
    def change(group):
        kept = tuple(name for name in group.layers if "kv_a_proj" not in name)
        return replace(group, layers=kept)

    assert wrong(v3(), change) > 0.1


def test_the_last_rows_of_kv_b_are_not_the_values():
    """As if it wrote all keys, then all values."""
    assert wrong(v3(), lambda group: replace(group, prev_rows="last", head_dim="") if group.head_dim else group) > 0.1


def test_no_scale_passes_a_clamp():
    """V4's up and down, with a bound that is met."""
    config = v4(swiglu_limit=1.0)
    owner, manager = default_manager().owner(config), default_manager()
    model = tiny_model(config, owner, manager)
    block = model.model.layers[0]
    (group,), _ = resolve_groups(block, [ScaleGroup(prev="mlp.experts.0.w3", layers=("mlp.experts.0.w2",))])
    up, down = (block.get_submodule(f"mlp.experts.0.{name}") for name in ("w3", "w2"))
    x = torch.randn(9, up.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = block.mlp.experts.run_expert(0, x)
        apply_to_block(block, group, torch.full((down.in_features,), 0.5))
        after = block.mlp.experts.run_expert(0, x)
    assert (after - before).norm() > 0.05 * before.norm()
    assert prove(config, owner, manager).proved


def plan_of(config):
    manager = default_manager()
    owner, model = manager.owner(config), build_skeleton(config)
    manager.prepare_model(owner, model)
    return make_plan(model, owner, manager, QuantConfig(group_size=32))


def test_each_group_resolves_where_it_should():
    plan = plan_of(v3())
    dense, mixture = plan.blocks
    assert not dense.skipped and not mixture.skipped
    folded = ["input_layernorm", "self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "self_attn.kv_b_proj"]
    folded += ["post_attention_layernorm"]
    assert [group.prev for group in dense.groups] == [*folded, "mlp.up_proj"]
    assert [group.prev for group in mixture.groups[:5]] == folded and mixture.groups[3].sections == 4
    assert all(one.quantize for one in plan.linears if ".layers." in one.name)


def test_the_layer_that_predicts_further_tokens_is_handed_on(tmp_path):
    """V3's checkpoints hold it behind the last layer; the model has no place for it."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(v3(), source)
    extra = {f"model.layers.61.{name}.weight": torch.randn(64, 64) for name in ("eh_proj", "self_attn.o_proj")}
    save_file({**load_file(source / "model.safetensors"), **extra}, source / "model.safetensors", {"format": "pt"})
    settings = QuantConfig(group_size=32, scale=False, clip="none", rounding="nearest")
    api.quantize(source, out, config=settings)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in extra.items())
    assert torch.isfinite(api.load(out)(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_the_indexer_is_kept():
    indexer = [one for one in plan_of(v32()).linears if ".indexer." in one.name]
    assert len(indexer) == 6 and not any(one.quantize for one in indexer)
