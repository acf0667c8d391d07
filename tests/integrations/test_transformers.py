"""transformers' own `from_pretrained` with this project's linears: the same model as `awq_core.load` makes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import awq_core
from awq_core import QuantConfig
from awq_core.errors import CheckpointError, ConfigError, UnsupportedModelError
from awq_core.hooks.manager import PluginManager
from awq_core.integrations import transformers as integration
from awq_core.runtime.linear import QuantLinear
from awq_core.testing import save_tiny

IDS = torch.randint(8, 100, (2, 11), generator=torch.Generator().manual_seed(0))
PLAIN = QuantConfig(group_size=32, scale=False, clip="none")
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def enabled():
    with integration.enable():
        yield


@pytest.fixture
def folder(quantized_llama, tmp_path):
    """A copy of the quantized model, to be damaged."""
    return shutil.copytree(quantized_llama, tmp_path / "quantized")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def linears(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantLinear)}


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def same(folder, **options):
    """Both ways of loading, after proving that they agree bit for bit."""
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder, **options), awq_core.load(folder, **options)
    assert {path: one.backend for path, one in linears(theirs).items()} == {
        path: one.backend for path, one in linears(ours).items()
    }
    assert linears(theirs)
    assert torch.equal(logits(theirs), logits(ours))
    return theirs, ours


# -- the same model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "int4pack", None])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float32])
def test_it_is_the_model_of_load(quantized_llama, monkeypatch, dtype, backend):
    if backend == "int4pack" and dtype != "bfloat16":
        pytest.skip("bfloat16 only")
    if backend:
        monkeypatch.setenv("AWQ_KERNEL", backend)
    theirs, ours = same(quantized_llama, dtype=dtype)
    assert theirs.dtype == ours.dtype and len(linears(theirs)) == 14
    assert {one.weight_dtype for one in linears(theirs).values()} == {ours.dtype}
    assert not theirs.training
    assert {t.device.type for t in (*theirs.parameters(), *theirs.buffers())} == {"cpu"}


def test_generate(quantized_llama):
    model = AutoModelForCausalLM.from_pretrained(quantized_llama)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = awq_core.load(quantized_llama).generate(input_ids=IDS, **options)
    assert torch.equal(model.generate(input_ids=IDS, **options), want)


def test_biases_and_a_quantized_head(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    save_tiny(Qwen2Config(**tiny, num_key_value_heads=2, vocab_size=128, tie_word_embeddings=False), source)
    awq_core.quantize(source, out, config=QuantConfig(group_size=32, scale=False, clip="none", lm_head=True))
    theirs, ours = same(out)
    assert "lm_head" in linears(theirs)
    biases = [(one.bias, linears(ours)[path].bias) for path, one in linears(theirs).items() if one.bias is not None]
    assert len(biases) == 6 and all(torch.equal(a, b) for a, b in biases)


def test_tied_embeddings(tmp_path, llama_config):
    save_tiny(llama_config(tie_word_embeddings=True), tmp_path / "source")
    awq_core.quantize(tmp_path / "source", tmp_path / "out", config=PLAIN)
    model, _ = same(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("keep", [(), ("model.layers.0.mlp.experts.1",)])
def test_a_mixture_with_its_experts(tmp_path, tiny_options, keep):
    """transformers would stack the experts; the plugin's linears are kept, and those in full precision with them."""
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2), tmp_path / "source")
    config = QuantConfig(group_size=32, scale=False, clip="none", modules_to_not_convert=keep)
    awq_core.quantize(tmp_path / "source", tmp_path / "out", config=config)
    model, _ = same(tmp_path / "out")
    kept = isinstance(model.get_submodule("model.layers.0.mlp.experts.1.w1"), torch.nn.Linear)
    assert kept if keep else len(linears(model)) == 2 * (4 + 4 * 3)
    assert "model.layers.1.mlp.experts.1.w2" in linears(model)
    made = model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (2, 14)


def test_a_mixture_nobody_claims(tmp_path, tiny_options, monkeypatch):
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2), tmp_path / "source")
    awq_core.quantize(tmp_path / "source", tmp_path / "out", config=PLAIN)
    want = logits(awq_core.load(tmp_path / "out"))
    monkeypatch.setattr(integration, "default_manager", lambda: PluginManager(allow=()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(linears(model)) == 2 * (4 + 4 * 3) and torch.equal(logits(model), want)


def test_experts_that_are_stored_stacked_are_refused(tmp_path, tiny_options, one_line):
    """They would be missing, and transformers would make some up."""
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2), tmp_path / "source")
    config = QuantConfig(group_size=32, scale=False, clip="none", modules_to_not_convert=("mlp.experts",))
    awq_core.quantize(tmp_path / "source", tmp_path / "out", config=config)
    same(tmp_path / "out")

    def stack(tensors):
        for layer in range(2):
            first = next(
                name for name in tensors if f"layers.{layer}." in name and name.endswith(".experts.0.w1.weight")
            )
            base, names = first.removesuffix("0.w1.weight"), ("w1", "w3", "w2")
            each = [[tensors.pop(f"{base}{expert}.{name}.weight") for name in names] for expert in range(4)]
            tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in each])
            tensors[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack([e[2] for e in each])

    change(tmp_path / "out", stack)
    with pytest.raises(UnsupportedModelError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    one_line(caught.value, "layers.0.mlp.experts.0.w1", "awq_core.load")


def test_a_packed_weight_without_a_place_is_refused(folder, one_line):
    change(folder, lambda t: t.update({"model.extra.qweight": t[f"{UP}.qweight"].clone()}))
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    one_line(caught.value, "model.extra.weight", "awq plugins list")


def test_sharded_folders(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(place.values()):
        mine = {name: tensor for name, tensor in tensors.items() if place[name] == shard}
        save_file(mine, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(folder)


# -- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(quantized_llama, device_map):
    pytest.importorskip("accelerate")
    if device_map == "auto" and torch.cuda.is_available():
        pytest.skip("would be the GPU")
    model = AutoModelForCausalLM.from_pretrained(quantized_llama, device_map=device_map)
    assert len(linears(model)) == 14
    assert torch.equal(logits(model), logits(awq_core.load(quantized_llama)))


@pytest.mark.parametrize("second", ["disk", "cuda:0", 0])
def test_offload_is_refused(quantized_llama, second, one_line):
    pytest.importorskip("accelerate")
    with pytest.raises(ConfigError) as caught:
        AutoModelForCausalLM.from_pretrained(quantized_llama, device_map={"model": "cpu", "lm_head": second})
    one_line(caught.value, "device_map", "not offloaded")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(quantized_llama):
    model = AutoModelForCausalLM.from_pretrained(quantized_llama, dtype="bfloat16", device_map="cuda:0")
    want = awq_core.load(quantized_llama, dtype="bfloat16", device="cuda:0")
    with torch.no_grad():
        assert torch.equal(model(IDS.cuda()).logits, want(IDS.cuda()).logits)


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{UP}.qzeros"), f"{UP}.qzeros"),
        (lambda t: t.pop(f"{UP}.scales"), f"{UP}.scales"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"].T.contiguous()}), f"{UP}.scales"),
        (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:32].clone()}), f"{UP}.qweight"),
        (lambda t: t.update({"model.layers.7.mlp.up_proj.qweight": t[f"{UP}.qweight"].clone()}), "layers.7"),
    ],
)
def test_a_damaged_linear_is_named(folder, edit, words, one_line):
    change(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    one_line(caught.value, words)


def test_a_missing_bias(tmp_path, llama_config):
    save_tiny(llama_config(attention_bias=True), tmp_path / "source")
    awq_core.quantize(tmp_path / "source", tmp_path / "out", config=PLAIN)
    same(tmp_path / "out")
    change(tmp_path / "out", lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.bias is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_other_layouts_are_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = "gemv"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'gemv'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_not_saved(quantized_llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized_llama)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "again")
    assert not [name for name in model.state_dict() if "codes" in name or "qweight" in name]


# -- on and off -------------------------------------------------------------------------------------------------------


def test_disable_restores_what_was_there():
    integration.disable()
    before = dict(AUTO_QUANTIZER_MAPPING)
    integration.disable()  # nothing to undo
    assert list(AUTO_QUANTIZER_MAPPING.items()) == list(before.items())
    integration.enable()
    integration.enable()
    assert AUTO_QUANTIZER_MAPPING["awq"] is integration.AwqQuantizer
    integration.disable()
    assert list(AUTO_QUANTIZER_MAPPING.items()) == list(before.items())


def test_the_context_ends_what_it_began():
    with integration.enable():  # the fixture enabled it first
        pass
    assert AUTO_QUANTIZER_MAPPING["awq"] is integration.AwqQuantizer
    integration.disable()
    with integration.enable():
        assert AUTO_QUANTIZER_MAPPING["awq"] is integration.AwqQuantizer
    assert AUTO_QUANTIZER_MAPPING["awq"] is not integration.AwqQuantizer


def test_a_class_that_came_later_stays(monkeypatch):
    class Other:
        pass

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "awq", Other)
    integration.disable()
    assert AUTO_QUANTIZER_MAPPING["awq"] is Other
