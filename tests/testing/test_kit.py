"""The kit's own parts: what it says of each kind of fault, what it asks of a package and of a folder, and its table."""

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, FalconConfig, GemmaConfig, LlamaConfig, MixtralConfig

import awq_core
from awq_core.cli.check_plugin import _table
from awq_core.errors import ConfigError, PlanError
from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets
from awq_core.hooks.manager import PluginManager
from awq_core.modules import unstack_experts
from awq_core.skeleton import build_skeleton
from awq_core.testing import ArchitectureConformance, diagnose, package
from awq_core.testing.check import Checked, Result, check
from awq_core.testing.on_disk import changing, check_folder

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = LlamaConfig(**TINY, intermediate_size=96, num_key_value_heads=2)
GEMMA = GemmaConfig(**TINY, intermediate_size=96, num_key_value_heads=2, head_dim=16)
QKV, UP, DOWN = "self_attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"
DENSE = "self_attention.dense"


def declared(config, *groups, blocks="model.layers", prepare=None, **fields):
    """(owner, manager) of a plugin that says just this."""
    stacks = (LayerStack(component="language", blocks=blocks),)
    arch = Architecture(
        family="hazel", model_types=(config.model_type,), stacks=stacks, scale_groups=tuple(groups), **fields
    )
    module = types.ModuleType("hazel")
    module.awq_architectures = hookimpl(lambda: (arch,))
    if prepare:
        module.awq_prepare_model = hookimpl(lambda model: prepare(model))
    manager = PluginManager(allow=())
    manager.register(module, "hazel")
    return manager.owner(config), manager


def said(config, *groups, **fields):
    return diagnose(config, *declared(config, *groups, **fields))


def falcon(**options):
    return FalconConfig(**TINY, ffn_hidden_size=96, **options)


# -- diagnosis


def test_nothing_is_said_of_groups_that_hold():
    assert said(LLAMA, *presets.LLAMA_BLOCK) == ""


def test_a_forgotten_reader_of_parallel_attention():
    message = said(falcon(), ScaleGroup(prev="input_layernorm", layers=(QKV,)), blocks="transformer.h")
    assert message.startswith(f"transformer.h.0: {UP} reads input_layernorm too; add it to layers")


def test_several_forgotten_readers():
    message = said(LLAMA, ScaleGroup(prev="input_layernorm", layers=("self_attn.v_proj",)))
    assert "self_attn.k_proj, self_attn.q_proj read input_layernorm too; add them" in message


def test_a_module_that_does_not_read_the_norm():
    attention, *_ = presets.attention()
    wrong = replace(attention, layers=(*attention.layers, "mlp.gate_proj"))
    message = said(LLAMA, wrong)
    assert "mlp.gate_proj does not read input_layernorm; take it out" in message


def test_a_norm_that_multiplies_by_one_plus_its_weight():
    groups = [replace(one, norm_offset=0.0) for one in presets.attention()]
    assert "input_layernorm multiplies by 1 + its weight; set norm_offset=1.0" in said(GEMMA, *groups)
    groups = [replace(one, norm_offset=1.0) for one in presets.attention()]
    assert "input_layernorm multiplies by its weight; set norm_offset=0.0" in said(LLAMA, *groups)


def test_rows_that_are_not_the_values():
    config = falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1)
    size = "self_attention.head_dim"
    values = ScaleGroup(prev=QKV, layers=(DENSE,), prev_rows="last", head_dim=size)
    message = said(config, values, blocks="transformer.h")
    assert f"the function is kept with prev_rows='heads', head_dim={size!r}" in message
    assert said(config, replace(values, prev_rows="heads"), blocks="transformer.h") == ""


def test_an_activation_between():
    message = said(falcon(), ScaleGroup(prev=UP, layers=(DOWN,)), blocks="transformer.h")
    assert f"no scale passes from {UP} to {DOWN}: remove the group and write it into exempt" in message


def test_a_forgotten_router():
    """Its weight is no linear's, and without it tokens go to other experts, whose inputs cannot be compared."""
    config = MixtralConfig(**TINY, intermediate_size=96, num_key_value_heads=2, head_dim=16, num_local_experts=4)
    groups = presets.moe_mlp(gate="w1", up="w3", down="w2", router="mlp.gate")

    def apart(model):
        return unstack_experts(model, "mlp.experts", names=("w1", "w3", "w2"))

    assert said(config, *groups, prepare=apart) == ""
    message = said(config, *(replace(one, compensate=()) for one in groups), prepare=apart)
    assert message.startswith("model.layers.0: mlp.gate reads post_attention_layernorm too; add it to layers, or to")


def test_a_residual_that_reads_the_norm():
    config = BloomConfig(**{**TINY, "n_head": 4, "n_layer": 2}, apply_residual_connection_post_layernorm=True)
    message = said(
        config, ScaleGroup(prev="input_layernorm", layers=("self_attention.query_key_value",)), blocks="transformer.h"
    )
    assert "something that is no module reads input_layernorm too, such as a residual" in message


# -- tests of the kit that must fail


class Kit(ArchitectureConformance):
    """The kit's tests, called one by one, on a plugin made here."""

    plugin = "awq_plugin_llama"

    def __init__(self, manager):
        self.given = manager

    @property
    def manager(self):
        return self.given


def kit(*groups, **fields):
    return Kit(declared(LLAMA, *groups, **fields)[1])


def test_the_kit_fails_with_the_diagnosis():
    attention, *rest = presets.LLAMA_BLOCK
    forgotten = kit(replace(attention, layers=attention.layers[1:]), *rest, exempt=("self_attn.q_proj",))
    with pytest.raises(pytest.fail.Exception, match=r"moves? the outputs by .*self_attn.q_proj reads input_layernorm"):
        forgotten.test_function_is_preserved(LLAMA)


def test_a_path_that_is_in_no_block():
    with pytest.raises(PlanError, match=r"nothing matches.*ln_1"):
        kit(*presets.attention("ln_1")).test_every_path_resolves_in_every_block(LLAMA)
    kit(*presets.LLAMA_BLOCK).test_every_path_resolves_in_every_block(LLAMA)


def test_readers_are_kept_together():
    kit(*presets.LLAMA_BLOCK).test_readers_of_one_tensor_share_one_fate(LLAMA)


def test_a_linear_in_no_group():
    with pytest.raises(AssertionError, match=r"mlp.gate_proj is in no scale group"):
        kit(*presets.attention()).test_every_linear_is_grouped_or_exempt(LLAMA)


# -- the package


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(source): a package of that source, to be imported; returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str) -> str:
        folder = tmp_path / "awq_plugin_hazel"
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        (folder / "data.py").write_text("import dataclasses, json\n")
        return "awq_plugin_hazel"

    return write


def test_a_light_import(written):
    assert package.loads(written("import fractions\nfrom awq_core.hooks import presets\nfrom . import data\n")) == []


@pytest.mark.parametrize("module", ["click", "awq_core.errors_of_nobody", "awq_core.modules"])
def test_a_heavy_import(written, module):
    name = written(f"import {module}\n")
    if "nobody" in module:
        with pytest.raises(AssertionError, match="cannot be imported: ModuleNotFoundError"):
            package.loads(name)
    else:
        assert module in package.loads(name)


def test_names_and_claims():
    infos = [types.SimpleNamespace(dist=dist) for dist in ("awq-plugin-hazel", "AWQ_plugin.hazel", "hazelnut")]
    assert package.misnamed(infos) == ["hazelnut"]
    one = types.SimpleNamespace(model_types=("a", "b"), class_names=("C",))
    assert package.twice([one, types.SimpleNamespace(model_types=("b",), class_names=())]) == ["b"]
    module = types.ModuleType("hazel")
    module.awq_scale_group = hookimpl(lambda arch: None)
    assert "did you mean 'awq_scale_groups'" in package.hook_problems(module)[0]


# -- the folder


@pytest.fixture(scope="module")
def quantized(llama_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("kit") / "out"
    config = awq_core.QuantConfig(group_size=32, clip="none", rounding="nearest")
    text = ["def add(a, b):\n    return a + b\n" * 8]
    result = awq_core.quantize(llama_source, out, config=config, calibration=text, samples=2, seq_len=32)
    return llama_source, out, result.plan, build_skeleton(awq_core.load(llama_source).config)


def test_a_folder_that_is_right(quantized):
    source, out, plan, skeleton = quantized
    check_folder(plan, skeleton, source, out)
    names = set(changing(plan))
    assert "model.layers.0.input_layernorm.weight" in names and "model.norm.weight" not in names


def test_a_kept_tensor_that_changed(quantized, tmp_path):
    source, out, plan, skeleton = quantized
    tensors = load_file(out / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    copy(out, tmp_path, tensors)
    with pytest.raises(AssertionError, match=r"model.norm.weight is kept but changed"):
        check_folder(plan, skeleton, source, tmp_path)


def test_a_name_that_changed(quantized, tmp_path):
    source, out, plan, skeleton = quantized
    tensors = load_file(out / "model.safetensors")
    tensors["model.last_norm.weight"] = tensors.pop("model.norm.weight")
    copy(out, tmp_path, tensors)
    with pytest.raises(AssertionError, match=r"names on disk differ .*model.last_norm.weight"):
        check_folder(plan, skeleton, source, tmp_path)


def copy(source: Path, out: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((source / "config.json").read_text())


def test_a_config_that_lists_something_else(quantized, tmp_path):
    source, out, plan, skeleton = quantized
    copy(out, tmp_path, load_file(out / "model.safetensors"))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"lm_head"', '"model.layers.0.mlp"'))
    with pytest.raises(AssertionError, match=r"modules_to_not_convert says otherwise"):
        check_folder(plan, skeleton, source, tmp_path)


# -- awq plugins check


def test_the_table():
    results = (
        Result("test_import_is_light", "", "passed", 0.1),
        Result("test_function_is_preserved", "a", "passed", 0.5),
        Result("test_function_is_preserved", "b", "failed", 0.5, "moved", "If this fails: look."),
        Result("test_fused_equals_unfused", "here-a", "skipped", 0.0, "nothing declared"),
    )
    checked = Checked("hazel", {"a": None, "b": None}, {"c": "no default configuration"}, results)
    lines = list(_table(checked))
    assert not checked.passed and replace(checked, results=results[:2]).passed
    assert not replace(checked, cases={}, results=()).passed, "nothing tested is nothing proved"
    assert lines[0].split()[:4] == ["passed", "import_is_light", "the", "package"]
    assert lines[1].split()[:3] == ["failed", "function_is_preserved", "b"]
    assert [line.strip() for line in lines[2:4]] == ["b: moved", "If this fails: look."]
    assert lines[4].split()[0] == "skipped"
    assert lines[-1] == "left out c: no default configuration; give one with --config"


def test_no_such_plugin():
    with pytest.raises(ConfigError, match="no plugin 'llamma' is installed; did you mean 'llama'"):
        check("llamma")
