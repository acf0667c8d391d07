"""Every member's block, GPT-2's turned weights, and fused query, key and value in both orders."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import (
    CodeGenConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    GptOssConfig,
    Starcoder2Config,
)

import awq_plugin_gpt
from awq_core import api
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.config import QuantConfig
from awq_core.hooks import presets
from awq_core.hooks.manager import PluginManager
from awq_core.modules import unstack_experts
from awq_core.runtime.load import load
from awq_core.testing import ArchitectureConformance, proof_error, save_tiny
from awq_core.testing.folder_tests import CALIBRATION
from awq_core.testing.tiny import tiny_weights

IDS = {"vocab_size": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, **IDS}
OLD = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 128, **IDS}
NEO = {"hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "window_size": 8, **IDS}
OSS = {**TINY, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
OSS |= {"sliding_window": 8, "swiglu_limit": 1.0}
JAPANESE = {**TINY, "intermediate_multiple_size": 2}
del JAPANESE["intermediate_size"]


class TestGPT(ArchitectureConformance):
    plugin = "awq_plugin_gpt"

    @staticmethod
    def configs():
        return {
            "gpt2": GPT2Config(**OLD),
            "gpt2-untied": GPT2Config(**OLD, tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True),
            "gpt_neo": GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 1]]),
            "gptj": GPTJConfig(**OLD, rotary_dim=8),
            "codegen": CodeGenConfig(**OLD, rotary_dim=8),
            "gpt_neox-japanese": GPTNeoXJapaneseConfig(**JAPANESE),
            "gpt_neox": GPTNeoXConfig(**TINY),
            "gpt_neox-serial": GPTNeoXConfig(**TINY, use_parallel_residual=False, attention_bias=False),
            "gpt_bigcode": GPTBigCodeConfig(**OLD, multi_query=True),
            "gpt_bigcode-multi-head": GPTBigCodeConfig(**OLD, multi_query=False),
            "starcoder2": Starcoder2Config(**TINY, num_key_value_heads=2, sliding_window=8),
            "gpt_oss": GptOssConfig(**OSS),
            "starcoder2-no-bias": Starcoder2Config(**TINY, num_key_value_heads=4, use_bias=False),
        }


def test_gptj_has_one_norm_for_attention_and_mlp():
    norm, values = awq_plugin_gpt.GPTJ.scale_groups
    without = replace(norm, layers=norm.layers[:3])
    assert proof_error(GPTJConfig(**OLD, rotary_dim=8), awq_plugin_gpt.GPTJ, (without, values)) > 0.1


def test_neox_values_are_in_every_heads_part():
    norm, values, mlp = awq_plugin_gpt.NEOX.scale_groups
    last = replace(values, prev_rows="last", head_dim="")
    assert proof_error(GPTNeoXConfig(**TINY), awq_plugin_gpt.NEOX, (norm, last, mlp)) > 0.05


def test_no_scale_passes_through_gelu():
    group = replace(awq_plugin_gpt.NEOX.scale_groups[0], prev="mlp.dense_h_to_4h", layers=("mlp.dense_4h_to_h",))
    group = replace(group, no_clip=())
    groups = (*awq_plugin_gpt.NEOX.scale_groups, group)
    assert proof_error(GPTNeoXConfig(**TINY), awq_plugin_gpt.NEOX, groups) > 0.05


def test_gpt_oss_down_has_no_group():
    up_to_down = presets.moe_mlp()[1]
    groups = (*awq_plugin_gpt.OSS.scale_groups, up_to_down)
    prepare = partial(unstack_experts, suffix="mlp.experts")
    assert proof_error(GptOssConfig(**OSS), awq_plugin_gpt.OSS, groups, prepare=prepare) > 0.01


def test_gpt_oss_router_reads_the_norm_of_the_experts():
    *attention, experts = awq_plugin_gpt.OSS.scale_groups
    prepare = partial(unstack_experts, suffix="mlp.experts")
    groups = (*attention, replace(experts, compensate=()))
    assert proof_error(GptOssConfig(**OSS), awq_plugin_gpt.OSS, groups, prepare=prepare) > 0.01


def test_gpt_oss_experts_compute_what_the_stack_computes():
    config = GptOssConfig(**OSS)
    apart, stacked = tiny_weights(config, seed=3), tiny_weights(config, seed=3)
    assert unstack_experts(apart, "mlp.experts")
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(apart(input_ids=ids).logits, stacked(input_ids=ids).logits)


def test_gpt_oss_loads_from_stacks_and_keeps_experts_apart(tmp_path):
    """The checkpoint stacks the experts. The result has each alone, quantized or not, and nothing of the stacks."""
    source, out, ids = tmp_path / "source", tmp_path / "out", torch.arange(8, 20)[None]
    model = save_tiny(GptOssConfig(**OSS), source)
    config = QuantConfig(group_size=32, modules_to_not_convert=("layers.0.mlp",))
    api.quantize(source, out, config=config, calibration=CALIBRATION, samples=4, seq_len=32)
    with CheckpointReader(out) as reader:
        assert not [name for name in reader.names if name.endswith(("experts.gate_up_proj", "experts.down_proj_bias"))]
        kept, stack = "model.layers.0.mlp.experts.3.up_proj.weight", model.model.layers[0].mlp.experts.gate_up_proj
        assert torch.equal(reader.tensor(kept), stack[3, :, 1::2].T)
        assert "model.layers.1.mlp.experts.3.up_proj.qweight" in reader.names
    with torch.no_grad():
        exact = model(input_ids=ids).logits
        torch.testing.assert_close(load(source)(input_ids=ids).logits, exact)
        got = load(out)(input_ids=ids).logits
    assert float((got - exact).norm() / exact.norm()) < 0.3


@pytest.fixture
def gpt2(tmp_path):
    """A saved GPT-2, and the model."""
    return tmp_path / "source", save_tiny(GPT2Config(**OLD), tmp_path / "source")


def test_gpt2_unquantized_loads_with_turned_weights(gpt2):
    folder, model = gpt2
    loaded, ids = load(folder), torch.arange(8, 20)[None]
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(loaded.get_parameter(name), model.get_parameter(name).T, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_gpt2_linears_that_are_kept_keep_their_shape_on_disk(gpt2, tmp_path):
    """`c_attn` is kept and divided by the scales of the group behind it, so it is written anew, turned back."""
    folder, model = gpt2
    out, ids = tmp_path / "out", torch.arange(8, 20)[None]
    config = QuantConfig(group_size=32, modules_to_not_convert=("c_attn", "mlp.c_fc"))
    api.quantize(folder, out, config=config, calibration=CALIBRATION, samples=4, seq_len=32)
    with CheckpointReader(folder) as before, CheckpointReader(out) as after:
        for name in before.names:
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                assert after.shape(name) == before.shape(name)
            if name.endswith("c_fc.weight"):
                assert torch.equal(after.tensor(name), before.tensor(name))
        name = "transformer.h.0.attn.c_attn.weight"
        assert torch.equal(after.tensor(name)[:, :128], before.tensor(name)[:, :128])  # query and key
        assert not torch.equal(after.tensor(name)[:, 128:], before.tensor(name)[:, 128:])  # value
    with torch.no_grad():
        got, exact = load(out)(input_ids=ids).logits, model(input_ids=ids).logits
    assert float((got - exact).norm() / exact.norm()) < 0.2


def test_gpt2_linears_compute_what_conv1d_computes():
    config = GPT2Config(**OLD)
    turned, plain = tiny_weights(config, seed=3), tiny_weights(config, seed=3)
    manager = PluginManager(allow=())
    manager.register(awq_plugin_gpt, "gpt")
    assert manager.prepare_model(manager.owner(config), turned)
    assert isinstance(turned.get_submodule("transformer.h.1.attn.c_attn"), torch.nn.Linear)
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(turned(input_ids=ids).logits, plain(input_ids=ids).logits)
