"""Inference against what people wrote by hand, and against models planted to mislead it."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MixtralConfig,
    NemotronConfig,
    Qwen2Config,
    ViTConfig,
)

from awq_core import infer
from awq_core.errors import UnsupportedModelError
from awq_core.hooks.manager import PluginManager
from awq_core.inference import infer_unknown
from awq_core.quantization.proof import prove, resolved
from awq_core.skeleton import build_skeleton

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
BY_HAND = {
    "llama": (LlamaConfig(**TINY, num_key_value_heads=2), "awq_plugin_llama"),
    "qwen2": (Qwen2Config(**TINY, num_key_value_heads=2), "awq_plugin_qwen"),
    "mixtral": (MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4), "awq_plugin_mistral"),
    "gemma2": (Gemma2Config(**TINY, num_key_value_heads=2, head_dim=16), "awq_plugin_gemma"),
    "falcon-7b": (FalconConfig(**{**TINY, "num_attention_heads": 4}, multi_query=True), "awq_plugin_falcon"),
}


def groups_of(config, manager):
    """Every group of every block of the real model, as it would be folded."""
    owner = manager.owner(config)
    model = build_skeleton(config)
    manager.prepare_model(owner, model)
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        (paths[id(block)], g.prev, frozenset(g.layers), frozenset(g.compensate), g.norm_offset, g.shared, g.sections)
        for block, g in resolved(model, owner, manager)
    }


@pytest.mark.parametrize("name", BY_HAND)
def test_the_same_groups_as_written_by_hand(name):
    config, plugin = BY_HAND[name]
    module = pytest.importorskip(plugin)
    manager = PluginManager(allow=())
    manager.register(module, module.awq_architectures()[0].family)
    found = infer(config)
    assert found.proved and found.control > 0.1 and found.coverage > 0.95
    mine = found.manager()
    assert groups_of(config, mine) == groups_of(config, manager)
    assert prove(config, mine.owner(config), mine).proved, "the ordinary proof, with its own tiny model"


def test_query_and_key_are_not_clipped():
    config, _ = BY_HAND["llama"]
    (group,) = [group for group in infer(config).arch.scale_groups if group.no_clip]
    assert group.prev == "input_layernorm"
    assert group.no_clip == ("self_attn.q_proj", "self_attn.k_proj")


def test_the_square_of_relu_is_found_and_its_degree():
    groups = infer(NemotronConfig(**TINY, num_key_value_heads=4)).arch.scale_groups
    (squared,) = [group for group in groups if group.degree != 1]
    assert (squared.prev, squared.layers, squared.degree) == ("mlp.up_proj", ("mlp.down_proj",), 2)


def test_values_between_the_heads_of_a_fused_projection():
    groups = infer(GPTNeoXConfig(**TINY)).arch.scale_groups
    (values,) = [group for group in groups if group.prev == "attention.query_key_value"]
    assert values.prev_rows == "heads" and values.layers == ("attention.dense",)


def test_conv1d_becomes_linears():
    found = infer(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128))
    assert found.proved and found.prepared.conv1d and found.coverage > 0.95
    assert [one.linear for one in found.unscaled] == ["mlp.c_proj"]
    assert "mlp.act" in found.unscaled[0].why, "what stands in between is named"


def test_a_linear_that_is_never_called_is_kept():
    """Its weight is read instead, and a quantized linear has none."""
    config = MambaConfig(hidden_size=64, state_size=8, num_hidden_layers=2, vocab_size=128, time_step_rank=8)
    found = infer(config)
    assert found.proved and found.arch.keep == ("mixer.dt_proj",)
    assert "mixer.dt_proj" not in found.arch.exempt


# -- planted


class PlantedConfig(LlamaConfig):
    model_type = "planted"
    kind = "parameter"


class HiddenGate(nn.Module):
    """An MLP beside a gate that reads the same norm through a parameter of its own."""

    def __init__(self, mlp, width):
        super().__init__()
        self.inner, self.gate_w = mlp, nn.Parameter(torch.zeros(3, width))

    def forward(self, x):
        return self.inner(x) * linear(x, self.gate_w).sum(-1, keepdim=True).sigmoid()


class NormInResidual(nn.Module):
    """An MLP whose input, the norm's output, is added to what it computes."""

    def __init__(self, mlp):
        super().__init__()
        self.inner = mlp

    def forward(self, x):
        return x + self.inner(x)


class Routed(nn.Module):
    """Two of eight experts, chosen by a router that is an ordinary linear with a multiple of eight outputs."""

    def __init__(self, width):
        super().__init__()
        self.router = nn.Linear(width, 8, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(8))

    def forward(self, x):
        weight, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        every = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (every.gather(-1, chosen.unsqueeze(-2).expand(*x.shape, 2)) * weight.unsqueeze(-2)).sum(-1)


class PlantedForCausalLM(LlamaForCausalLM):
    config_class = PlantedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            if config.kind == "parameter":
                layer.mlp = HiddenGate(layer.mlp, config.hidden_size)
            elif config.kind == "residual":
                layer.mlp = NormInResidual(layer.mlp)
            elif config.kind == "router":
                layer.mlp = Routed(config.hidden_size)
            elif config.kind == "empty":
                layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
                layer.mlp = layer.self_attn.v_proj = nn.Identity()
        self.post_init()


AutoConfig.register("planted", PlantedConfig, exist_ok=True)
AutoModelForCausalLM.register(PlantedConfig, PlantedForCausalLM, exist_ok=True)


def planted(kind):
    return PlantedConfig(**TINY, num_key_value_heads=4, kind=kind)


def test_a_parameter_that_reads_the_norm_in_secret_is_named():
    found = infer(planted("parameter"))
    assert "post_attention_layernorm" not in {group.prev for group in found.arch.scale_groups}
    whys = {one.linear: one.why for one in found.unscaled}
    assert set(whys) == {"mlp.inner.gate_proj", "mlp.inner.up_proj"}
    assert all(re.search(r"the parameter mlp\.gate_w \[3, \d+\] reads it too", why) for why in whys.values()), whys
    assert found.proved, "what is left is right"
    assert any(text.startswith("mlp.gate_w [3, ") for text in found.unreached)


def test_a_residual_that_reads_the_norm_is_told_apart():
    found = infer(planted("residual"))
    whys = {one.linear: one.why for one in found.unscaled}
    assert "neither a linear nor a parameter" in whys["mlp.inner.up_proj"]
    assert found.proved


def test_a_router_is_compensated_and_not_quantized():
    (group,) = [g for g in infer(planted("router")).arch.scale_groups if g.prev == "post_attention_layernorm"]
    assert group.compensate == ("mlp.router",) and group.layers == ("mlp.experts.*",)


def test_nothing_to_prove_is_no_proof():
    found = infer(planted("empty"))
    assert not found.proved and found.why_not.startswith("no scale group can be proved")


def test_the_error_is_that_of_the_groups_that_are_proposed(monkeypatch):
    """A search that proposes rubbish is caught by the proof of the whole."""
    readers = importlib.import_module("awq_core.inference.readers")
    right = readers.Search._grown

    def forgetful(self, plan, scale, factor):
        found = right(self, plan, scale, factor)
        short = isinstance(found, readers.Group) and len(found.layers) > 1
        return readers.replace(found, layers=found.layers[:1]) if short else found

    monkeypatch.setattr(readers.Search, "_grown", forgetful)
    found = infer(BY_HAND["llama"][0])
    assert {group.prev for group in found.arch.scale_groups} == {"self_attn.v_proj", "mlp.up_proj"}
    assert any("changes the function in model.layers.0" in one.why for one in found.unscaled)


def test_no_language_model_at_all(one_line):
    with pytest.raises(UnsupportedModelError) as error:
        infer(ViTConfig())
    one_line(error.value)


# -- who needs it


def test_only_a_model_that_nobody_claims(llama_source):
    module = pytest.importorskip("awq_plugin_llama")
    manager = PluginManager(allow=())
    found = infer_unknown(llama_source, manager)
    assert found is not None and found.arch.model_types == ("llama",)
    manager.register(module, "llama")
    assert infer_unknown(llama_source, manager) is None


def test_a_named_plugin_that_does_not_claim_it_is_not_replaced(llama_source):
    manager = PluginManager(allow=())
    manager.register(importlib.import_module("awq_plugin_mistral"), "mistral")
    with pytest.raises(UnsupportedModelError, match="does not claim"):
        infer_unknown(llama_source, manager, plugin="mistral")


def test_the_example_of_the_documentation_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "plugins" / "inference.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(compile(example, "inference.md", "exec"), {})
    assert "self_attn.v_proj -> self_attn.o_proj" in capsys.readouterr().out
