"""Skeletons against normally built models: same tree, same buffers, no weights; and names against real checkpoints."""

import copy
import json
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2VLConfig,
)

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError, ConfigError, PluginError, UnsupportedModelError
from awq_core.hooks import Architecture, LayerStack, hookimpl
from awq_core.hooks.manager import PluginManager, default_manager
from awq_core.model_folder import load_config, open_config, raw_config, resolve
from awq_core.skeleton import build_skeleton, checkpoint_names, model_class, set_parameter
from awq_core.testing.tiny import save_tiny, tiny_weights

NARROW = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


def llava():
    return LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=LlamaConfig(**NARROW), image_token_index=2)


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "hidden_size": 64}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return Qwen2VLConfig(vision_config=vision, text_config={**NARROW, "rope_parameters": rope})


CONFIGS = {
    "llama": lambda: LlamaConfig(**NARROW),
    "llama-yarn": lambda: LlamaConfig(**NARROW, rope_parameters=YARN, max_position_embeddings=256),
    "qwen2-tied": lambda: Qwen2Config(**NARROW, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64),
    "mixtral": lambda: MixtralConfig(**NARROW, num_local_experts=4),
    "llava": llava,
    "qwen2_vl": qwen2_vl,
}


def normally_built(config, dtype=torch.float32):
    cls = model_class(config)
    build = getattr(cls, "_from_config", None) or cls.from_config
    return build(copy.deepcopy(config), dtype=dtype)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_skeleton_has_everything_but_the_weights(name):
    config = CONFIGS[name]()
    before = config.to_dict()
    skeleton, real = build_skeleton(config), normally_built(config)
    assert config.to_dict() == before
    shapes = {name: tuple(p.shape) for name, p in real.named_parameters(remove_duplicate=False)}
    found = dict(skeleton.named_parameters(remove_duplicate=False))
    assert {name: tuple(parameter.shape) for name, parameter in found.items()} == shapes
    assert {parameter.device.type for parameter in found.values()} == {"meta"}
    assert not any(parameter.requires_grad for parameter in found.values())
    buffers = dict(real.named_buffers())
    assert dict(skeleton.named_buffers()).keys() == buffers.keys()
    for path, buffer in skeleton.named_buffers():
        assert buffer.device.type == "cpu", path
        assert torch.equal(buffer, buffers[path]), path
    assert not skeleton.training
    if name != "gpt2":
        assert any(path.endswith("inv_freq") and buffer.abs().sum() > 0 for path, buffer in skeleton.named_buffers())


def test_dtype_is_the_parameters_dtype_and_rotary_tables_stay_exact():
    config = LlamaConfig(**NARROW)
    skeleton = build_skeleton(config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}
    assert torch.equal(skeleton.model.rotary_emb.inv_freq, normally_built(config).model.rotary_emb.inv_freq)


def test_tied_weights_are_one_parameter():
    skeleton = build_skeleton(Qwen2Config(**NARROW, tie_word_embeddings=True))
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    untied = build_skeleton(Qwen2Config(**NARROW, tie_word_embeddings=False))
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_a_quantized_configuration_builds_the_plain_model_and_keeps_its_settings():
    config = LlamaConfig(**NARROW)
    config.quantization_config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    before = copy.deepcopy(config.quantization_config)
    skeleton = build_skeleton(config)
    assert type(skeleton.model.layers[0].self_attn.q_proj) is nn.Linear
    assert config.quantization_config == before


def test_modules_built_afterwards_have_weights_again():
    build_skeleton(LlamaConfig(**NARROW))
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    broken = LlamaConfig(**{**NARROW, "hidden_act": "no such activation"})
    with pytest.raises(KeyError):
        build_skeleton(broken)
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_models_may_be_built_by_several_threads():
    """A server loads one model while it makes another: neither sees the other's meta device."""
    real, stop = [], threading.Event()

    def others():
        while not stop.is_set():
            real.append(nn.Linear(2, 2).weight.device.type)

    def build():
        return build_skeleton(LlamaConfig(**NARROW))

    watcher = threading.Thread(target=others)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            made = [future.result() for future in [pool.submit(build) for _ in range(12)]]
    finally:
        stop.set()
        watcher.join()
    assert {p.device.type for model in made for p in model.parameters()} == {"meta"}
    assert real and set(real) == {"cpu"}
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_the_class_is_the_one_the_checkpoint_names():
    assert model_class(LlamaConfig(**NARROW)) is AutoModelForCausalLM
    config = LlamaConfig(**NARROW, architectures=["LlamaForCausalLM"])
    assert model_class(config).__name__ == "LlamaForCausalLM"
    assert type(build_skeleton(llava())).__name__ == "LlavaForConditionalGeneration"
    unknown = LlamaConfig(**NARROW, architectures=["InHouseForCausalLM"])
    assert type(build_skeleton(unknown)).__name__ == "LlamaForCausalLM"


def test_set_parameter_replaces_in_place():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    weight, mean = torch.full((2, 2), 3.0), torch.full((2,), 4.0)
    set_parameter(module, "0.weight", weight)
    set_parameter(module, "1.running_mean", mean)
    assert module[0].weight.data_ptr() == weight.data_ptr() and not module[0].weight.requires_grad
    assert module[1].running_mean is mean and "running_mean" in dict(module[1].named_buffers())


# -- names on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "mixtral", "llava", "qwen2_vl"])
def test_names_on_disk_lead_to_the_same_weights(name, tmp_path):
    """What save_pretrained wrote, found again: the tensor of each name on disk is the model's tensor of that name."""
    config = CONFIGS[name]()
    manager = default_manager()
    owner = manager.owner(config)
    save_tiny(config, tmp_path)
    model, skeleton = tiny_weights(config), build_skeleton(config)
    assert manager.prepare_model(owner, model) == manager.prepare_model(owner, skeleton)
    weights = model.state_dict()
    with CheckpointReader(tmp_path) as reader:
        names = checkpoint_names(skeleton, reader.names)
        assert sorted(names.values()) == sorted(reader.names), "every stored tensor has one place"
        for inside, on_disk in names.items():
            assert torch.equal(reader.tensor(on_disk), weights[inside]), f"{on_disk} is not {inside}"
    untied = {path for path, _ in skeleton.named_parameters()}
    assert untied <= names.keys(), "every weight has a tensor"


def test_the_names_do_differ(tmp_path):
    """Or the test above would prove nothing: transformers writes Mixtral and LLaVA under their old names."""
    for name, inside, on_disk in (
        ("mixtral", "model.layers.1.mlp.experts.3.w2.weight", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        (
            "llava",
            "model.language_model.layers.0.mlp.up_proj.weight",
            "language_model.model.layers.0.mlp.up_proj.weight",
        ),
    ):
        skeleton = build_skeleton(CONFIGS[name]())
        manager = default_manager()
        manager.prepare_model(manager.owner(skeleton.config), skeleton)
        assert checkpoint_names(skeleton, (on_disk,)) == {inside: on_disk}


def test_tensors_without_a_place_are_left_out():
    skeleton = build_skeleton(LlamaConfig(**NARROW))
    stored = ("model.norm.weight", "model.layers.7.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.qweight", "x")
    assert checkpoint_names(skeleton, stored) == {"model.norm.weight": "model.norm.weight"}


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./none", "/none/of/this", "a/b/c"])
def test_a_folder_that_is_not_there(name, one_line):
    with pytest.raises(CheckpointError) as caught:
        resolve(name)
    one_line(caught.value, name, "no such model folder")


def test_a_file_is_no_folder(tmp_path, one_line):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        resolve(tmp_path / "model.safetensors")
    one_line(caught.value, "model.safetensors")


def test_a_hub_name_is_fetched_and_a_silent_hub_is_one_line(monkeypatch, tmp_path, one_line):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "org/gone":
            raise OSError("no route\nto host")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve("org/name") == tmp_path
    assert resolve("org/name", weights=False) == tmp_path
    with_weights, without = (patterns for _, patterns in asked)
    assert "*.safetensors" in with_weights and "*.safetensors" not in without and "*.json" in without
    assert not any(pattern.endswith((".bin", "*")) for pattern in with_weights)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/gone")
    assert one_line(caught.value, "org/gone", "no route").count("to host") == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no config.json"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "not a JSON object"),
    ],
)
def test_a_bad_config_json(tmp_path, content, words, one_line):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        raw_config(tmp_path)
    one_line(caught.value, tmp_path, words)


# -- whose code runs --------------------------------------------------------------------------------------------------


def in_house(auto_module=None, model_type="in_house"):
    stack = LayerStack(component="language", blocks="model.layers")
    arch = Architecture(family="acorn", model_types=(model_type,), stacks=(stack,), auto_module=auto_module)

    class Plugin:
        @hookimpl
        def awq_architectures(self):
            return (arch,)

    manager = PluginManager(allow=())
    manager.register(Plugin(), "acorn", dist="awq-plugin-acorn", version="1.2")
    return manager


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    """A folder that brings its own configuration class, and says aloud when that is imported."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "remote"
    folder.mkdir()
    auto_map = {"AutoConfig": "configuration_in_house.InHouseConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "in_house", "auto_map": auto_map, "width": 5}))
    code = f"""
        from pathlib import Path
        from transformers import PretrainedConfig
        Path({str(tmp_path / "ran")!r}).write_text("imported")
        class InHouseConfig(PretrainedConfig):
            model_type = "in_house"
    """
    (folder / "configuration_in_house.py").write_text(textwrap.dedent(code))
    return folder


def test_a_models_own_code_is_not_run_unasked(remote_code, tmp_path, one_line):
    with pytest.raises(ConfigError) as caught:
        open_config(remote_code, in_house())
    one_line(caught.value, remote_code, "own Python code", "--trust-remote-code")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "ran").exists()


def test_a_models_own_code_is_run_when_asked(remote_code, tmp_path):
    config, owner = open_config(remote_code, in_house(), trust_remote_code=True)
    assert (type(config).__name__, config.width, owner.arch.family) == ("InHouseConfig", 5, "acorn")
    assert (tmp_path / "ran").exists()


def test_nobodys_model_is_refused_before_its_code_is_run(remote_code, tmp_path, one_line):
    with pytest.raises(UnsupportedModelError) as caught:
        open_config(remote_code, PluginManager(allow=()), trust_remote_code=True)
    one_line(caught.value, "'in_house'")
    assert not (tmp_path / "ran").exists()


def test_a_model_type_that_transformers_does_not_know(tmp_path, one_line):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "in_house"}))
    with pytest.raises(CheckpointError) as caught:
        load_config(tmp_path)
    one_line(caught.value, tmp_path, "in_house", "does transformers know this model_type?")


def test_an_auto_module_that_fails_is_the_plugins_fault(tmp_path, monkeypatch, one_line):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "in_house"}))
    with pytest.raises(PluginError) as caught:
        open_config(tmp_path, in_house(auto_module="awq_no_such_module.modeling"))
    one_line(caught.value, "awq-plugin-acorn 1.2", "awq_no_such_module.modeling", "ModuleNotFoundError")
    assert caught.value.exit_code == 4
    (tmp_path / "awq_test_broken.py").write_text("raise RuntimeError('one\\ntwo')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError) as caught:
        open_config(tmp_path, in_house(auto_module="awq_test_broken"))
    one_line(caught.value, "RuntimeError: one two")


def test_memory_for_large_stacks_is_not_asked_for():
    """Experts of 30 GB a layer, in one tensor: more than many machines have, and never filled."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=1)
    skeleton = build_skeleton(config)
    stack = skeleton.model.layers[3].mlp.experts.gate_up_proj
    assert stack.shape == (256, 4096, 7168) and stack.device.type == "meta"
    assert skeleton.model.rotary_emb.inv_freq.device.type == "cpu"
