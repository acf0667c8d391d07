"""Loading: the same function as with dequantized weights, every damage named, other models as they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig

import awq_core
from awq_core import QuantConfig
from awq_core.errors import (
    AwqError,
    CheckpointError,
    ConfigError,
    NumericsError,
    PluginConflictError,
    UnsupportedModelError,
)
from awq_core.hooks import Architecture, LayerStack, hookimpl
from awq_core.hooks.manager import PluginManager
from awq_core.kernels.cpu import build
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load
from awq_core.testing import save_tiny

IDS = torch.randint(8, 100, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits.double()


def apart(got, want):
    return float((got - want).norm() / want.norm())


def kernels_of(model):
    return {module.backend for module in model.modules() if isinstance(module, QuantLinear)}


def change(folder, edit):
    """Rewrite the weights of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(quantized_llama, tmp_path):
    """A copy of the quantized model, to be damaged."""
    return shutil.copytree(quantized_llama, tmp_path / "quantized")


# -- the same function ------------------------------------------------------------------------------------------------


def test_it_is_the_model_with_dequantized_weights(quantized_llama, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    quantized, expected = load(quantized_llama), load(quantized_llama, fake_quant=True)
    assert kernels_of(quantized) == {"reference"} and not kernels_of(expected)
    assert sum(isinstance(module, QuantLinear) for module in quantized.modules()) == 14
    assert apart(logits(quantized), logits(expected)) < 1e-4


@pytest.mark.parametrize("backend", ["int4pack", "cpu"])
def test_in_bf16_too(quantized_llama, monkeypatch, backend):
    """bf16 moves the answer by a percent whatever multiplies; the int4 kernel must not add to that."""
    if backend == "cpu" and isinstance(build.library(), str):
        pytest.skip(f"no C++ kernel here: {build.library()}")
    monkeypatch.setenv("AWQ_KERNEL", backend)
    quantized = load(quantized_llama, dtype="bfloat16")
    ordinary = load(quantized_llama, dtype=torch.bfloat16, fake_quant=True)
    assert kernels_of(quantized) == {backend}
    assert {parameter.dtype for parameter in quantized.parameters()} == {torch.bfloat16}
    exact = logits(load(quantized_llama, fake_quant=True))
    unavoidable = apart(logits(ordinary), exact)
    assert unavoidable < 1.5e-2
    assert apart(logits(quantized), exact) < 1.3 * unavoidable
    assert apart(logits(quantized), logits(ordinary)) < 2e-2


def test_it_is_near_the_original(quantized_llama, llama_source):
    """Random weights round badly; but the answer is the model's own, and round-to-nearest is no better."""
    original, quantized = logits(load(llama_source)), logits(load(quantized_llama))
    assert apart(quantized, original) < 0.4
    assert apart(logits(load(quantized_llama), IDS.flip(1)), original) > 0.8, "the scale of the comparison"


def test_padding_and_generation(quantized_llama):
    model = load(quantized_llama)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    made = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    alone = model.generate(input_ids=IDS[:1, 4:], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 16)
    assert torch.equal(made[0, 11:], alone[0, 7:]), "what is padded is not seen"


def test_a_loaded_model_is_ready(quantized_llama):
    model = load(quantized_llama)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_tied_embeddings_stay_tied(tmp_path, llama_config, corpus, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(llama_config(tie_word_embeddings=True), source)
    awq_core.quantize(source, out, config=QuantConfig(group_size=32), calibration=corpus, samples=4, seq_len=32)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model = load(out)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert apart(logits(model), logits(load(out, fake_quant=True))) < 1e-4


def test_a_mixture_loads_with_its_experts(tmp_path, tiny_options, corpus, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2), source)
    awq_core.quantize(source, out, config=QuantConfig(group_size=32), calibration=corpus, samples=4, seq_len=32)
    model = load(out)
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 2 * (4 + 4 * 3)
    assert "model.layers.1.mlp.experts.3.w2" in linears
    assert apart(logits(model), logits(load(out, fake_quant=True))) < 1e-4
    assert apart(logits(model), logits(load(source))) < 0.5
    made = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 14)


# -- other folders ----------------------------------------------------------------------------------------------------


def test_an_unquantized_folder_is_the_ordinary_model(llama_source):
    model = load(llama_source)
    assert not kernels_of(model)
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(llama_source)))


def test_a_model_nobody_claims_still_runs(quantized_llama, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    model = load(quantized_llama, manager=PluginManager(allow=()))
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert torch.equal(logits(model), logits(load(quantized_llama)))


def test_a_plugin_that_was_asked_for_must_claim_it(quantized_llama, one_line):
    with pytest.raises(UnsupportedModelError) as caught:
        load(quantized_llama, plugin="mistral")
    one_line(caught.value, "'mistral'", "'llama'")
    with pytest.raises(ConfigError) as unknown:
        load(quantized_llama, plugin="lama")
    one_line(unknown.value, "did you mean 'llama'?")


def test_two_claims_are_settled_by_name(quantized_llama, one_line):
    manager = PluginManager(allow=())
    for name in ("acorn", "beech"):
        stack = LayerStack(component="language", blocks="model.layers")
        arch = Architecture(family=name, model_types=("llama",), stacks=(stack,))
        manager.register(_plugin(arch), name)
    with pytest.raises(PluginConflictError) as caught:
        load(quantized_llama, manager=manager)
    one_line(caught.value, "'acorn'", "'beech'")
    assert kernels_of(load(quantized_llama, manager=manager, plugin="beech"))


def _plugin(arch):
    class Plugin:
        @hookimpl
        def awq_architectures(self):
            return (arch,)

    return Plugin()


def test_generation_settings_are_kept(model_folder, tmp_path, corpus):
    settings = GenerationConfig(max_length=77, top_k=7, temperature=0.5, do_sample=True, eos_token_id=[3, 4])
    settings.save_pretrained(model_folder)
    out = tmp_path / "out"
    awq_core.quantize(model_folder, out, config=QuantConfig(group_size=32, scale=False, clip="none"))
    for folder in (model_folder, out):
        kept = load(folder).generation_config
        assert (kept.max_length, kept.top_k, kept.temperature, kept.eos_token_id) == (77, 7, 0.5, [3, 4])


# -- damage -----------------------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{UP}.qweight"), (f"{UP}",)),
        (lambda t: t.pop(f"{UP}.qzeros"), (f"{UP}.qzeros",)),
        (lambda t: t.pop(f"{UP}.scales"), (f"{UP}.scales",)),
        (lambda t: t.pop("model.norm.weight"), ("no weights for 1 tensors", "model.norm.weight")),
        (lambda t: t.pop("lm_head.weight"), ("lm_head.weight",)),
        (
            lambda t: t.update({"model.layers.2.norm.weight": torch.ones(64)}),
            ("no place", "model.layers.2.norm.weight"),
        ),
        (lambda t: t.update({f"{UP}.weight": torch.ones(96, 64)}), (UP,)),
        (lambda t: t.update({f"{UP}.g_idx": torch.ones(64).int()}), ("no place", f"{UP}.g_idx")),
        (
            lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:32].clone()}),
            (f"{UP}.qweight", "(32, 12)", "(64, 12)"),
        ),
        (lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"][:1].clone()}), (f"{UP}.qzeros", "(1, 12)", "(2, 12)")),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].T.contiguous()}), (f"{UP}.scales", "(96, 2)")),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].float()}), (f"{UP}.scales", "float32")),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}), (f"{UP}.qweight", "int64")),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), ("model.norm.weight", "(63,)", "(64,)")),
        (lambda t: t.update({"lm_head.weight": torch.ones(128, 32)}), ("lm_head.weight", "(128, 32)", "(128, 64)")),
    ],
)
def test_a_damaged_tensor_is_named(folder, edit, words, one_line):
    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, *words)
    assert caught.value.exit_code == 1 and caught.value.hint


@pytest.mark.parametrize("name", [f"{UP}.scales", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(folder, name, value, one_line):
    change(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(NumericsError) as caught:
        load(folder)
    one_line(caught.value, name, "NaN or inf")


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_the_bias_of_a_quantized_linear_must_be_there(tmp_path, llama_config, damage, one_line):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(llama_config(attention_bias=True), source)
    awq_core.quantize(source, out, config=QuantConfig(group_size=32, scale=False, clip="none"))
    bias = "model.layers.0.self_attn.k_proj.bias"
    assert load(out).model.layers[0].self_attn.k_proj.bias is not None
    change(out, lambda t: t.pop(bias) if damage == "missing" else t.update({bias: torch.ones(1)}))
    with pytest.raises(CheckpointError) as caught:
        load(out)
    one_line(caught.value, bias)


@pytest.mark.parametrize("left", [4, 1000, -16])
def test_a_truncated_shard_is_named(folder, left, one_line):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, "model.safetensors", "truncated or corrupt")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.pop("quantization_config"), ("no quantization_config", "qweight")),
        (lambda c: c["quantization_config"].update(group_size=64), ("qzeros", "group_size")),
        (lambda c: c["quantization_config"].update(version="gemv"), ("'gemv'",)),
        (lambda c: c["quantization_config"].update(bits=8), ("bits=8",)),
        (lambda c: c.update(num_hidden_layers=3), ("no weights for", "model.layers.2.")),
        (lambda c: c.update(num_hidden_layers=1), ("no place for", "model.layers.1.")),
        (lambda c: c.update(intermediate_size=64), ("mlp",)),
    ],
)
def test_a_configuration_of_another_model_is_refused(folder, edit, words, one_line):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, *words)


def test_a_folder_without_config_json_is_no_model(folder, one_line):
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, folder, "no config.json")


def test_an_empty_folder_is_no_model(tmp_path, one_line):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    one_line(caught.value, tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "toaster"}, "device='toaster'"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "mps"}, "device='mps'"),
        ({"device": {"": 0}}, "device="),
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
    ],
)
def test_devices_and_dtypes_that_are_not_there(quantized_llama, options, words, one_line):
    with pytest.raises(ConfigError) as caught:
        load(quantized_llama, **options)
    one_line(caught.value, words)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there(quantized_llama, one_line):
    with pytest.raises(ConfigError) as caught:
        load(quantized_llama, device="cuda:0")
    one_line(caught.value, "device='cuda:0'", "no GPU")


def test_every_failure_is_one_kind_of_error():
    for kind in (CheckpointError, ConfigError, NumericsError, PluginConflictError, UnsupportedModelError):
        assert issubclass(kind, AwqError)
