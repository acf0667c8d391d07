"""Kept linears in 8 bits: decoded byte by byte, loaded by transformers through compressed-tensors, and read back."""

import importlib
import json
import shutil
import sys
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2Config
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import awq_core
from awq_core.checkpoint.pack import dequantize
from awq_core.errors import CheckpointError, ConfigError, NumericsError, UnsupportedModelError
from awq_core.evaluation import compare_weights
from awq_core.export import eight_bit
from awq_core.export.formats import FORMATS, export_checkpoint, import_checkpoint
from awq_core.export.source import open_source
from awq_core.testing import save_tiny

CT = "compressed-tensors"
IDS = torch.arange(8, 40)[None]
DOWN = "model.layers.0.mlp.down_proj"
ATTENTION = [f"model.layers.1.self_attn.{one}_proj" for one in "qkvo"]
PLAIN = {"scale": False, "clip": "none"}


def quantized(config, folder, dtype=torch.float32, group_size=32, **settings):
    torch.manual_seed(0)
    save_tiny(config, folder / "source", dtype=dtype)
    settings = awq_core.QuantConfig(group_size=group_size, **PLAIN, **settings)
    awq_core.quantize(folder / "source", folder / "DIR", config=settings)
    return folder / "DIR"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, llama_config):
    """A tied Llama in bfloat16 of which `DOWN` and an attention were kept, and its export with both in 8 bits."""
    folder = tmp_path_factory.mktemp("mixed")
    keep = ("layers.0.mlp.down_proj", "layers.1.self_attn")
    made = quantized(llama_config(tie_word_embeddings=True), folder, torch.bfloat16, modules_to_not_convert=keep)
    return made, export_checkpoint(made, folder / "ct", CT, eight_bit=["*"]).out


@pytest.fixture
def damaged(mixed, tmp_path):
    """damaged(change): a copy of the export whose tensors, by name, and `quantization_config` were changed."""

    def damage(change):
        folder = shutil.copytree(mixed[1], tmp_path / "damaged")
        tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return damage


def section_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def octets(words):
    """int32 [rows, n] to numbers 0..255, [rows, 4n]: the bytes as they lie in memory, which is little-endian."""
    return torch.from_numpy(words.contiguous().numpy().view("<u1").copy()).long()


def decoded(folder):
    """The weights of the linears of 8 bits, by name: (q - z) · s rounded to the dtype of s."""
    tensors = {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}
    weights = {}
    for full, words in tensors.items():
        name = full.removesuffix(".weight_packed")
        if name == full:
            continue
        out, rows = tensors[f"{name}.weight_shape"].tolist()
        if words.shape != (out, (rows + 3) // 4):
            continue
        scales = tensors[f"{name}.weight_scale"]
        codes, zeros = octets(words)[:, :rows], octets(tensors[f"{name}.weight_zero_point"].t())[:, :out].t()
        group = torch.arange(rows) // (rows // scales.shape[1])
        weights[name] = ((codes - zeros[:, group]).double() * scales.double()[:, group]).to(scales.dtype)
    return weights


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def continuation(model):
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)


def from_pretrained(folder):
    integration = pytest.importorskip("awq_core.integrations.compressed_tensors")
    with integration.enable():
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def expected(folder, made):
    """The model that `made` must be: ours, with every weight decoded in this file or by `dequantize`, in float32."""
    ours = awq_core.load(folder, fake_quant=True, dtype="float32")
    with open_source(folder) as source:
        for name, path in source.linears.items():
            packed = source.linear(name)
            ours.get_submodule(path).weight.copy_(dequantize(packed, packed.scales.dtype).float())
        names = {on_disk.removesuffix(".weight"): path for path, on_disk in source.stored.items()}
    for name, weight in decoded(made).items():
        ours.get_submodule(names[name].removesuffix(".weight")).weight.copy_(weight.float())
    return ours


def expect_the_same(found, ours):
    with torch.no_grad():
        found = found.float()
    want = logits(ours)
    assert (logits(found) - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(continuation(found), continuation(ours))


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [16, 48])
def test_rounding_is_to_the_nearest(dtype, group):
    weight = (torch.randn(12, 48, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[0] = 0
    weight[1] = weight[1].abs()  # of one sign: zero is in the range all the same
    made = eight_bit.nearest("a", weight, group)
    assert made.codes.dtype == made.zeros.dtype == torch.uint8 and made.zeros.shape == (12, 48 // group)
    assert made.scales.dtype == (torch.float16 if dtype == torch.float32 else dtype)
    for row in range(12):
        for g in range(48 // group):
            step, zero = made.scales[row, g].double(), int(made.zeros[row, g])
            part = weight[row, g * group : (g + 1) * group].double()
            levels = (torch.arange(256).double() - zero) * step
            best = (part[:, None] - levels).abs().min(1).values
            found = levels[made.codes[row, g * group : (g + 1) * group].long()]
            torch.testing.assert_close((part - found).abs(), best, rtol=1e-4, atol=1e-9)
            # The step is rounded to 16 bits, so the ends of the range may lie up to half a step outside of the levels.
            assert (part - found).abs().max() <= 1.01 * step and levels[zero] == 0
    assert not made.codes[0].any() and not made.zeros[1].any()


def test_steps_that_float16_cannot_hold(one_line):
    with pytest.raises(NumericsError) as caught:
        eight_bit.nearest("model.x", torch.tensor([[3e7, -3e7]]), 2)
    one_line(caught.value, "model.x", "8 bits", "float16")


# -- what lies where --------------------------------------------------------------------------------------------------


def test_the_layout_is_the_packages_own(mixed):
    """Its unpacking, whose numbers are 128 less, and its packing of them give what is in the file."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    tensors = load_file(mixed[1] / "model.safetensors")
    assert set(decoded(mixed[1])) == {DOWN, *ATTENTION}
    for name in (DOWN, *ATTENTION):
        words, zeros = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_zero_point"]
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        codes = helpers.unpack_from_int32(words, 8, shape)
        assert torch.equal(codes.int() + 128, octets(words)[:, : shape[1]].int())
        assert torch.equal(helpers.pack_to_int32(codes, 8), words)
        middle = helpers.unpack_from_int32(zeros, 8, tensors[f"{name}.weight_scale"].shape, packed_dim=0)
        assert torch.equal(helpers.pack_to_int32(middle, 8, packed_dim=0), zeros)


def test_the_configuration_names_every_linear_once(mixed):
    """By compressed-tensors' own matching: each linear has one scheme, and engines' fused ones one each too."""
    match = pytest.importorskip("compressed_tensors.utils.match")
    section = section_of(mixed[1])
    groups = {one["weights"]["num_bits"]: one for one in section["config_groups"].values()}
    assert {bits: one["weights"]["group_size"] for bits, one in groups.items()} == {8: 32, 4: 32}
    assert not any(one["weights"]["symmetric"] for one in groups.values()) and section["ignore"] == ["lm_head"]
    model = awq_core.load(mixed[0], fake_quant=True)
    found = {bits: {n for n, _ in match.match_named_modules(model, one["targets"])} for bits, one in groups.items()}
    assert found[8] == {DOWN, *ATTENTION} and len(found[4]) == 14 - 5 and not found[4] & found[8]
    # vLLM asks first for the class of a fused linear: no target may be one.
    assert not any("Linear" in target for one in groups.values() for target in one["targets"])


def test_it_is_smaller(mixed, tmp_path):
    """By half of the chosen weights, less what their scales, zero points and shapes take."""
    plain = export_checkpoint(mixed[0], tmp_path / "ct", CT)
    files = [load_file(folder / "model.safetensors") for folder in (plain.out, mixed[1])]
    sizes = [sum(one.nbytes for one in tensors.values()) for tensors in files]
    weights = 64 * 96 + 2 * 64 * 64 + 2 * 32 * 64
    assert sizes[0] - sizes[1] == weights * 2 - (weights + weights // 32 * (2 + 1) + 5 * 16)
    assert plain.eight_bit == () and plain.notes == ()
    cards = [(folder / "README.md").read_text() for folder in (plain.out, mixed[1])]
    assert ["kept linears in 8 bits" in card for card in cards] == [False, True] == ["enable" in card for card in cards]


# -- transformers -----------------------------------------------------------------------------------------------------


def test_transformers_computes_the_same(mixed):
    found = from_pretrained(mixed[1])
    for name, weight in decoded(mixed[1]).items():
        assert torch.equal(found.get_submodule(name).weight, weight), name
    assert found.lm_head.weight is found.model.embed_tokens.weight
    expect_the_same(found, expected(*mixed))


def test_biases_float16_odd_shapes_and_the_head(tmp_path, tiny_options):
    """Rows of 90 inputs, which are no multiple of the group or the word, become one group each."""
    config = Qwen2Config(**{**tiny_options, "intermediate_size": 90, "tie_word_embeddings": False, "vocab_size": 125})
    keep = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.self_attn.v_proj")
    folder = quantized(config, tmp_path, torch.float16, modules_to_not_convert=keep)
    made = export_checkpoint(folder, tmp_path / "ct", CT, eight_bit=["*", "lm_head"])
    assert set(made.eight_bit) == {
        *(f"model.layers.0.self_attn.{one}_proj" for one in "qkv"),
        *(f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)),
        "lm_head",
    }
    schemes = [one["weights"] for one in section_of(made.out)["config_groups"].values()]
    found = [(one["num_bits"], one["strategy"], one["group_size"]) for one in schemes]
    assert found == [(8, "group", 32), (8, "channel", None), (4, "group", 32)]
    assert set(decoded(made.out)) == set(made.eight_bit)
    expect_the_same(from_pretrained(made.out), expected(folder, made.out))


def test_a_folder_of_whole_rows(tmp_path, llama_config):
    folder = quantized(llama_config(), tmp_path, torch.bfloat16, group_size=-1, modules_to_not_convert=("down_proj",))
    made = export_checkpoint(folder, tmp_path / "ct", CT, eight_bit=["down_proj"])
    assert len(made.eight_bit) == 2 and len(section_of(made.out)["config_groups"]) == 2
    expect_the_same(from_pretrained(made.out), expected(folder, made.out))
    assert compare_weights(folder, import_checkpoint(made.out, tmp_path / "back").out).others


def test_a_model_with_images(tmp_path, tiny_options):
    """Names differ between file and model; `*` takes the language model's, and what is kept whole goes by its name."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    integration = pytest.importorskip("awq_core.integrations.compressed_tensors")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tower, image_size=16, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny_options), image_token_index=2)
    folder = quantized(config, tmp_path, torch.bfloat16, modules_to_not_convert=("layers.0.mlp.down_proj",))
    names = ["*", "vision_tower", "projector.linear_1"]
    made = export_checkpoint(folder, tmp_path / "ct", CT, eight_bit=names)
    assert len(made.eight_bit) == len(decoded(made.out)) == 1 + 2 * 6 + 1
    with integration.enable():
        found, info = AutoModelForImageTextToText.from_pretrained(made.out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = expected(folder, made.out)
    for (name, one), (_, other) in zip(found.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(one.float(), other), name
    expect_the_same(found, ours)


@pytest.mark.parametrize("names", [[], ["self_attn"], ["*"]])
def test_experts_with_zero_points(tmp_path, tiny_options, names):
    """transformers stacks them, those in 4 bits, in 8 and in 16; `*` takes a layer's experts, not its router."""
    config = MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2)
    keep = ("layers.1.mlp.experts", "layers.0.self_attn")
    folder = quantized(config, tmp_path, torch.bfloat16, modules_to_not_convert=keep)
    made = export_checkpoint(folder, tmp_path / "ct", CT, eight_bit=names)
    assert len(made.eight_bit) == {"": 0, "self_attn": 4, "*": 16}["".join(names)]
    assert len(made.notes) == 1 and "experts have zero points" in made.notes[0]
    targets = [target for one in section_of(made.out)["config_groups"].values() for target in one["targets"]]
    assert (r"re:^model\.layers\.0\.mlp\.experts\." in targets) == bool(names)
    ours = awq_core.load(made.out, fake_quant=True, dtype="bfloat16")
    expect_the_same(from_pretrained(made.out), ours.float())
    assert "model.layers.0.mlp.gate" in section_of(made.out)["ignore"]


def test_linears_lying_on_their_side(tmp_path):
    """GPT-2's weights have inputs first; quantized ones do not, in any format."""
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
    folder = quantized(config, tmp_path, modules_to_not_convert=("h.1.attn", "h.0.mlp"))
    made = export_checkpoint(folder, tmp_path / "ct", CT, eight_bit=["*"])
    assert len(made.eight_bit) == 4 and "Conv1D" in made.notes[0]
    expect_the_same(from_pretrained(made.out), expected(folder, made.out))
    back = import_checkpoint(made.out, tmp_path / "back").out
    tensors, before = (load_file(one / "model.safetensors") for one in (back, folder))
    for name, weight in decoded(made.out).items():
        kept = tensors[f"{name}.weight"]
        assert kept.shape == before[f"{name}.weight"].shape and torch.equal(kept, weight.t()), name


def test_transformers_alone_refuses_it_or_is_right(mixed):
    """It takes one scheme for all linears. The order of the schemes makes that an error, never noise."""
    pytest.importorskip("compressed_tensors")
    try:
        found = AutoModelForCausalLM.from_pretrained(mixed[1])
    except RuntimeError as error:
        assert "conversion" in str(error)
    else:
        expect_the_same(found, expected(*mixed))


def test_enable_and_disable():
    integration = pytest.importorskip("awq_core.integrations.compressed_tensors")
    before = AUTO_QUANTIZER_MAPPING[CT]
    with integration.enable():
        assert AUTO_QUANTIZER_MAPPING[CT] is integration.Quantizer
        with integration.enable():
            pass
        assert AUTO_QUANTIZER_MAPPING[CT] is integration.Quantizer
    integration.disable()
    assert AUTO_QUANTIZER_MAPPING[CT] is before


def test_float8_experts_are_left_to_transformers():
    """What is not packed goes the way it goes without `enable`."""
    integration = pytest.importorskip("awq_core.integrations.compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    config = QuantizationConfig(config_groups={"a": group}, format="float-quantized", quantization_status="compressed")
    quantizer = types.SimpleNamespace(compressor=types.SimpleNamespace(quantization_config=config))
    model = torch.nn.ParameterDict({"gate": torch.nn.Parameter(torch.zeros(2, 4, 8, dtype=torch.bfloat16))})
    codes = [torch.randn(4, 8).to(torch.float8_e4m3fn) for _ in range(2)]
    tensors = {"experts.*.w1.weight": codes, "experts.*.w1.weight_scale": [torch.rand(4, 1) + 1 for _ in range(2)]}
    options = {"source_patterns": [], "target_patterns": [], "full_layer_name": "gate", "model": model}
    ours, theirs = (
        kind(quantizer).convert(dict(tensors), **options)
        for kind in (integration.Dequantize, integration.CompressedTensorsDequantize)
    )
    assert list(ours) == list(theirs) == ["experts.*.w1.weight"]
    for expert in range(2):
        expected = (codes[expert].float() * tensors["experts.*.w1.weight_scale"][expert]).bfloat16()
        assert torch.equal(ours["experts.*.w1.weight"][expert], expected)


def test_without_the_package(monkeypatch, one_line):
    name = "awq_core.integrations.compressed_tensors"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    with pytest.raises(ConfigError) as caught:
        importlib.import_module(name)
    one_line(caught.value, "needs transformers 5.23", transformers.__version__, "pip install")


# -- which ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "count"),
    [(["layers.1.self_attn.q_proj"], 3), (["o_proj"], 1), (["down_proj", "v_proj"], 4), (["layers.1", DOWN], 5)],
)
def test_what_engines_fuse_goes_together(mixed, tmp_path, names, count):
    made = export_checkpoint(mixed[0], tmp_path / "ct", CT, eight_bit=names)
    assert len(made.eight_bit) == count
    fused = set(ATTENTION[:3])
    assert not fused & set(made.eight_bit) or fused <= set(made.eight_bit)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lm_head", ("lm_head shares its weight", "embed_tokens")),
        ("head", ("say lm_head",)),
        ("embed_tokens", ("no linear has that",)),
        ("up_proj", ("model.layers.0.mlp.up_proj is in 4 bits",)),
        ("", ("no name is empty",)),
    ],
)
def test_names_that_mean_nothing(mixed, tmp_path, one_line, name, words):
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(mixed[0], tmp_path / "x", CT, eight_bit=[name])
    one_line(caught.value, "--eight-bit", *words)
    assert not (tmp_path / "x").exists()


def test_why_a_linear_cannot_be(tmp_path, llama_config, one_line, quantized_llama):
    folder = quantized(llama_config(intermediate_size=90), tmp_path)
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(folder, tmp_path / "x", CT, eight_bit=["gate_proj"])
    one_line(caught.value, "gate_proj", "90 outputs are not a multiple of 8")
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(quantized_llama, tmp_path / "x", CT, eight_bit=["*"])
    one_line(caught.value, "no linear of the blocks was kept")


@pytest.mark.parametrize("to", [one for one in FORMATS if one != CT])
def test_other_formats_have_no_8_bits(mixed, tmp_path, one_line, to):
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(mixed[0], tmp_path / "x", to, eight_bit=["*"])
    one_line(caught.value, f"--to {to}", "8 bits", f"--to {CT}")
    assert caught.value.exit_code == 2 and not (tmp_path / "x").exists()


def test_a_model_nobody_claims(mixed, tmp_path, monkeypatch):
    """What is fused is inferred, as what is scaled is."""
    from awq_core.export import source
    from awq_core.hooks.manager import PluginManager

    for module in (source, eight_bit):
        monkeypatch.setattr(module, "default_manager", lambda: PluginManager(allow=()))
    made = export_checkpoint(mixed[0], tmp_path / "ct", CT, eight_bit=["q_proj"])
    assert set(made.eight_bit) == set(ATTENTION[:3])


def test_a_model_of_which_nothing_can_be_proved(mixed, tmp_path, monkeypatch, one_line):
    def nothing(*_, **__):
        raise UnsupportedModelError("model type 'odd' cannot be inferred", hint="write a plugin")

    monkeypatch.setattr(eight_bit, "claimant", lambda *_: None)
    monkeypatch.setattr(eight_bit, "infer_unknown", nothing)
    with pytest.raises(UnsupportedModelError) as caught:
        export_checkpoint(mixed[0], tmp_path / "x", CT, eight_bit=["*"])
    one_line(caught.value, "odd")


# -- read back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_load_reads_them_as_16_bits(mixed, dtype):
    model = awq_core.load(mixed[1], dtype=dtype)
    for name, weight in decoded(mixed[1]).items():
        assert torch.equal(model.get_submodule(name).weight, weight.to(getattr(torch, dtype))), name
    ours = awq_core.load(mixed[0], dtype="float32", fake_quant=True)
    for name, weight in decoded(mixed[1]).items():
        ours.get_submodule(name).weight.copy_(weight.float())
    found = awq_core.load(mixed[1], dtype="float32", fake_quant=True)
    assert torch.equal(logits(found), logits(ours))


def test_import_keeps_them_in_16_bits(mixed, tmp_path):
    back = import_checkpoint(mixed[1], tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (mixed[0], back.out))
    weights = {f"{name}.weight": weight for name, weight in decoded(mixed[1]).items()}
    assert set(before) == set(after) and back.linears == 9
    for name, tensor in after.items():
        assert torch.equal(tensor, weights.get(name, before[name])), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (mixed[0], back.out)]
    assert configs[0] == configs[1]
    assert set(compare_weights(mixed[0], mixed[1]).others) == set(weights)
    again = export_checkpoint(mixed[1], tmp_path / "again", CT)
    assert again.eight_bit == () and len(section_of(again.out)["config_groups"]) == 1


def llm_compressor_style(tensors, section):
    """Symmetric 8 bits whose zero points are not stored, regular expressions, the 4-bit group first."""
    wide = {"num_bits": 8, "symmetric": True}
    for group in section["config_groups"].values():
        eight = group["weights"]["num_bits"] == 8
        group["targets"] = [r"re:.*self_attn.*"] if eight else ["Linear"]
        group["weights"] |= wide if eight else {}
    section["config_groups"] = dict(reversed(section["config_groups"].items()))
    for name in (DOWN, *ATTENTION):
        tensors[f"{name}.weight_zero_point"] = torch.full_like(tensors[f"{name}.weight_zero_point"], -0x7F7F7F80)


def test_a_folder_by_llm_compressor(damaged):
    """The same codes around 128: with the zero points stored so, and without."""
    explicit = damaged(lambda tensors, section: llm_compressor_style(tensors, section))
    weights = decoded(explicit)
    tensors = load_file(explicit / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not (n.endswith("zero_point") and n.rpartition(".")[0] in weights)}
    save_file(kept, explicit / "model.safetensors", metadata={"format": "pt"})
    model = awq_core.load(explicit, dtype="float32")
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.float()), name


def test_zero_points_that_are_not_packed(damaged, mixed):
    """As compressed-tensors stored them before its pull request 296: int8, 128 less."""

    def change(tensors, section):
        stored = octets(tensors[f"{DOWN}.weight_zero_point"].t())[:, :64].t()
        tensors[f"{DOWN}.weight_zero_point"] = (stored - 128).to(torch.int8).contiguous()

    model = awq_core.load(damaged(change), dtype="float32")
    assert torch.equal(model.get_submodule(DOWN).weight, decoded(mixed[1])[DOWN].float())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, s: t.pop(f"{DOWN}.weight_zero_point"), (DOWN, "no zero points")),
        (lambda t, s: t.pop(f"{DOWN}.weight_scale"), (DOWN, "weight_scale")),
        (lambda t, s: t.pop(f"{DOWN}.weight_shape"), (DOWN, "weight_shape")),
        (lambda t, s: t.update({f"{DOWN}.weight_shape": torch.tensor([64])}), (DOWN, "weight_shape", "(2)")),
        (lambda t, s: t.update({f"{DOWN}.weight_scale": torch.ones(64, 6).half()}), (DOWN, "6 groups", "96 input")),
        (lambda t, s: t.update({f"{DOWN}.weight_scale": torch.ones(63, 3).half()}), (DOWN, "weight_scale", "(63, 3)")),
        (
            lambda t, s: t.update({f"{DOWN}.weight_zero_point": torch.ones(8, 3, dtype=torch.int32)}),
            (DOWN, "weight_zero_point", "(16, 3)"),
        ),
        (
            lambda t, s: t.update({f"{DOWN}.weight_g_idx": torch.arange(96).flip(0) // 32}),
            (DOWN, "grouped out of order"),
        ),
        (
            lambda t, s: s.update(config_groups={"group_0": s["config_groups"]["group_0"]}),
            ("group_0", "num_bits=8", "no group has 4 bits"),
        ),
        (
            lambda t, s: s.update(config_groups={"group_1": s["config_groups"]["group_1"]}),
            (DOWN, "weight_packed", "expected (64, 12)"),
        ),
    ],
)
def test_what_does_not_fit_is_one_line(damaged, one_line, change, words):
    with pytest.raises(CheckpointError) as caught:
        awq_core.load(damaged(change))
    one_line(caught.value, *words)


def test_a_scale_that_overflows(damaged, one_line):
    def change(tensors, section):
        tensors[f"{DOWN}.weight_scale"] = torch.full((64, 3), 6e4, dtype=torch.float16)

    with pytest.raises(NumericsError) as caught:
        awq_core.load(damaged(change))
    one_line(caught.value, DOWN, "overflows")
