"""Every format holds the same integers and scales: decoded here bit by bit, and brought back."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import awq_core
from awq_core.checkpoint.pack import PackedLinear, dequantize, pack_linear, unpack
from awq_core.errors import CheckpointError, ConfigError, NumericsError, OutputError, UnsupportedModelError
from awq_core.evaluation import compare_weights
from awq_core.export import compressed_tensors, gptq
from awq_core.export.card import Card
from awq_core.export.formats import FORMATS, export_checkpoint, import_checkpoint
from awq_core.export.source import open_source
from awq_core.export.writing import plain_config

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "runtime" / "fixtures"
FOREIGN = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
LAYOUTS = ("gptq", "gptq_v2", "compressed-tensors")
SIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama_config, corpus) -> Path:
    """A tied Llama in groups of 32, one of its linears kept, scales in bfloat16, with a chat template."""
    from awq_core.testing import save_tiny

    folder = tmp_path_factory.mktemp("export")
    save_tiny(llama_config(tie_word_embeddings=True), folder / "source", dtype=torch.bfloat16)
    (folder / "source" / "chat_template.jinja").write_text("{{ messages }}")
    config = awq_core.QuantConfig(group_size=32, modules_to_not_convert=("layers.1.mlp.down_proj",))
    awq_core.quantize(folder / "source", folder / "DIR", config=config, calibration=corpus, samples=4, seq_len=32)
    return folder / "DIR"


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory):
    """exported("gptq"): the folder of that export. Never change it."""
    folder, made = tmp_path_factory.mktemp("exports"), {}

    def export(to):
        if to not in made:
            made[to] = export_checkpoint(quantized, folder / to, to).out
        return made[to]

    return export


def section_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def bits(word, place):
    """A nibble of one int32, by arithmetic on Python's integers."""
    return (int(word) % 2**32) // 16**place % 16


def random_linear(rows=64, out=16, group=32, lowest=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, rows), generator=generator)
    zeros = torch.randint(lowest, 16, (out, rows // group), generator=generator)
    scales = torch.rand(out, rows // group, generator=generator) + 0.01
    return codes, zeros, pack_linear(codes, scales, zeros)


# -- what lies where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "less"), [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_bit_by_bit(version, less):
    codes, zeros, packed = random_linear(lowest=less)
    found = gptq.tensors("a", packed, version=version)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "a.qweight": (8, 16),
        "a.qzeros": (2, 2),
        "a.scales": (2, 16),
        "a.g_idx": (64,),
    }
    assert all(tensor.is_contiguous() for tensor in found.values())
    for i in range(64):
        assert int(found["a.g_idx"][i]) == i // 32
        for o in range(16):
            assert bits(found["a.qweight"][i // 8, o], i % 8) == codes[o, i]
    for g in range(2):
        for o in range(16):
            assert bits(found["a.qzeros"][g, o // 8], o % 8) == zeros[o, g] - less


def test_compressed_tensors_bit_by_bit():
    codes, zeros, packed = random_linear()
    found = compressed_tensors.tensors("a", packed, symmetric=False)
    assert found["a.weight_shape"].tolist() == [16, 64]
    assert {tensor.dtype for tensor in found.values()} == {torch.int32, torch.int64, torch.float16}
    assert torch.equal(found["a.weight_scale"], packed.scales.t())
    for o in range(16):
        for i in range(64):
            assert bits(found["a.weight_packed"][o, i // 8], i % 8) == codes[o, i]
        for g in range(2):
            assert bits(found["a.weight_zero_point"][o // 8, g], o % 8) == zeros[o, g]
    assert "a.weight_zero_point" not in compressed_tensors.tensors("a", packed, symmetric=True)


def test_compressed_tensors_unpacks_it():
    """The package's own unpacking, whose numbers are 8 less; also where the inputs do not fill the last word."""
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes, zeros, packed = random_linear(rows=36, group=36)
    found = compressed_tensors.tensors("a", packed, symmetric=False)
    own = helpers.unpack_from_int32(found["a.weight_packed"], 4, torch.Size((16, 36)))
    assert torch.equal(own.int() + 8, codes.int())
    own = helpers.unpack_from_int32(found["a.weight_zero_point"], 4, torch.Size((16, 1)), packed_dim=0)
    assert torch.equal(own.int() + 8, zeros.int())


# -- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", LAYOUTS)
def test_an_export_comes_back_as_it_was(quantized, exported, tmp_path, to):
    back = import_checkpoint(exported(to), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (quantized, back.out))
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert json.loads((back.out / "config.json").read_text()) == json.loads((quantized / "config.json").read_text())
    assert back.linears == 13


@pytest.mark.parametrize("to", ["awq", *LAYOUTS])
def test_it_loads_here_with_the_same_weights(quantized, exported, to):
    comparison = compare_weights(quantized, exported(to))
    assert comparison.equal and len(comparison.linears) == 13 and not comparison.only_a and not comparison.only_b
    a, b = (awq_core.load(folder, fake_quant=True, dtype="float32") for folder in (quantized, exported(to)))
    for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", FOREIGN)
def test_the_weights_of_an_import_are_the_toolkits(name, tmp_path, monkeypatch):
    """Decoded by the benchmarks' code, which shares none with the reader."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peers.layouts import plain_weights

    made = import_checkpoint(FIXTURES / name, tmp_path / "awq")
    expected, found = plain_weights(FIXTURES / name), plain_weights(made.out)
    assert set(expected) == set(found) and made.linears == 7
    for key, weight in expected.items():
        assert torch.equal(weight, found[key]), key
    section = section_of(made.out)
    assert section["version"] == "gemm" and section["modules_to_not_convert"] == ["lm_head"]
    assert section["group_size"] == (-1 if name.endswith("channel") else 32)


@pytest.mark.parametrize("name", FOREIGN)
def test_any_toolkits_folder_becomes_compressed_tensors(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from peers.layouts import plain_weights

    made = export_checkpoint(FIXTURES / name, tmp_path / "ct", "compressed-tensors")
    expected, found = plain_weights(FIXTURES / name), plain_weights(made.out)
    assert set(expected) == set(found)
    assert all(torch.equal(weight, found[key]) for key, weight in expected.items())
    weights = section_of(made.out)["config_groups"]["group_0"]["weights"]
    assert weights["symmetric"] == ("symmetric" in name or name == "autoround-awq-symmetric")
    assert (weights["strategy"], weights["group_size"]) == (("channel", None) if "channel" in name else ("group", 32))


def test_shards_and_their_index(quantized, tmp_path, monkeypatch):
    """Many small shards, as a large model has; read back, and exported from again."""
    from awq_core.checkpoint import writer
    from awq_core.export import writing

    monkeypatch.setattr(writing, "CheckpointWriter", lambda out: writer.CheckpointWriter(out, shard_bytes=16 << 10))
    made = export_checkpoint(quantized, tmp_path / "shards", "gptq_v2").out
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    back = import_checkpoint(made, tmp_path / "back").out
    assert compare_weights(quantized, back).equal


def test_one_linear_is_in_memory_at_a_time(quantized):
    with open_source(quantized) as source:
        last = None
        for _, value in source.weights():
            gc.collect()
            assert last is None or last() is None
            tensor = value.qweight if isinstance(value, PackedLinear) else value
            last = weakref.ref(tensor)
            del value, tensor


# -- the rest of the folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["awq", *LAYOUTS, "torch", "scaled-fp16"])
def test_side_files_are_carried(quantized, exported, to):
    folder = exported(to)
    there = [name for name in SIDE if (quantized / name).exists()]
    assert "tokenizer.json" in there
    for name in [*there, "chat_template.jinja"]:
        assert (folder / name).read_bytes() == (quantized / name).read_bytes(), name
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    config = json.loads((folder / "config.json").read_text())
    original = json.loads((quantized / "config.json").read_text())
    method = config.pop("quantization_config", {}).get("quant_method")
    assert method == {"gptq_v2": "gptq", "torch": "awq", "scaled-fp16": None}.get(to, to)
    original.pop("quantization_config")
    assert config == original


@pytest.mark.parametrize("to", ["awq", *LAYOUTS, "torch", "scaled-fp16"])
def test_the_card_says_the_format(quantized, exported, to):
    text, original = ((folder / "README.md").read_text() for folder in (exported(to), quantized))
    format_row = next(line for line in text.splitlines() if line.startswith("| format |"))
    words = {"awq": "gemm", "torch": "state dict", "scaled-fp16": "16-bit", "compressed-tensors": "pack-quantized"}
    assert words.get(to, f"`{to}`") in format_row and "groups of 32" in format_row
    assert text.count("\n## Use\n") == 1 and text.count("# source, ") == 1
    for kept in ("| method |", "| calibration |", "## Kept as they were"):
        assert kept in text and kept in original
    assert "| size |" not in text
    assert ("awq_core.load" in text) == (to == "awq")


def test_a_card_of_others_is_not_quoted():
    card = Card("X", ("x",), "form \\1 of X", "use NAME")
    text = card.text("# Their model\n\nBuy now!\n", "folder")
    assert "Buy" not in text and "# folder, X" in text and "| format | form \\1 of X |" in text
    assert "tags: [x]" in text and text.endswith("## Use\n\nuse folder\n") and "Converted from `folder`" in text


def test_the_quantized_head_is_explained_only_where_it_is_true():
    """What the card says of engines and the head is about AWQ's layout."""
    original = (
        "---\nbase_model: m\ntags: [awq]\n---\n\n# m, AWQ 4-bit\n\n"
        '| format | AWQ "gemm": 4-bit codes, zero points, x |\n'
        "\n## The output head is quantized\n\nEngines ...\n\n## Kept as they were\n\n- norms\n\n## Use\n\nold\n"
    )
    other, same = (Card("X", ("x",), form, "new").text(original, "f") for form in ("XY", 'AWQ "gemm"'))
    assert "Engines" in same and "Engines" not in other
    assert all("Kept as they were" in text and "old" not in text and "new" in text for text in (other, same))


def test_what_is_kept_is_named(exported):
    ignore = section_of(exported("compressed-tensors"))["ignore"]
    assert ignore == ["model.layers.1.mlp.down_proj", "lm_head"]  # the tied head, which no file names, too
    dynamic = section_of(exported("gptq"))["dynamic"]
    assert list(dynamic) == [r"-:^model\.layers\.1\.mlp\.down_proj$", r"-:^lm_head$"]


def test_routers_are_named_though_they_are_no_linears(tmp_path, tiny_options):
    from transformers import MixtralConfig

    from awq_core.testing import save_tiny

    config = MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2)
    save_tiny(config, tmp_path / "source")
    settings = awq_core.QuantConfig(group_size=32, scale=False, clip="none")
    awq_core.quantize(tmp_path / "source", tmp_path / "DIR", config=settings)
    with open_source(tmp_path / "DIR") as source:
        assert "model.layers.0.block_sparse_moe.gate" in source.kept and "lm_head" in source.kept
        assert not any("embed" in name or "norm" in name for name in source.kept)
        assert "model.layers.0.block_sparse_moe.experts.0.w1" in source.linears
    made = export_checkpoint(tmp_path / "DIR", tmp_path / "out", "awq").out
    kept = section_of(made)["modules_to_not_convert"]
    assert not any(one in name for one in kept for name in source.linears)  # engines search for them in the names


def test_a_quantized_head_is_said_to_be(tmp_path, llama_source):
    settings = awq_core.QuantConfig(group_size=32, scale=False, clip="none", lm_head=True)
    awq_core.quantize(llama_source, tmp_path / "DIR", config=settings)
    for to, where in (("awq", "awq"), ("gptq_v2", "gptq")):
        section = section_of(export_checkpoint(tmp_path / "DIR", tmp_path / to, to).out)
        assert section["quant_method"] == where and section["lm_head"] is True
    ignore = section_of(export_checkpoint(tmp_path / "DIR", tmp_path / "ct", "compressed-tensors").out)["ignore"]
    assert "lm_head" not in ignore


def test_a_plain_configuration():
    raw = {"a": 1, "quantization_config": {"x": 1}, "text_config": {"b": 2, "quantization_config": {}}}
    assert plain_config(raw) == {"a": 1, "text_config": {"b": 2}}


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_zero_point_of_zero(one_line):
    _, zeros, packed = random_linear()
    assert (zeros == 0).any()
    with pytest.raises(CheckpointError) as caught:
        gptq.tensors("model.x", packed, version="gptq")
    one_line(caught.value, "model.x", "gptq_v2")
    assert gptq.tensors("model.x", packed, version="gptq_v2")


def test_inputs_that_fill_no_word(one_line):
    packed = random_linear(rows=36, group=36)[2]
    with pytest.raises(CheckpointError) as caught:
        gptq.tensors("model.x", packed, version="gptq_v2")
    one_line(caught.value, "36 input features")


def test_an_unknown_format(quantized, tmp_path, one_line):
    with pytest.raises(ConfigError) as caught:
        export_checkpoint(quantized, tmp_path / "x", "exl2")
    one_line(caught.value, "'exl2'", *FORMATS)


def test_a_model_that_is_not_quantized(llama_source, tmp_path, one_line):
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(llama_source, tmp_path / "x", "gptq")
    one_line(caught.value, "is not quantized", "awq quantize")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["awq", "torch"])
def test_a_folder_that_is_there(quantized, tmp_path, one_line, to):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError) as caught:
        export_checkpoint(quantized, tmp_path / "x", to)
    one_line(caught.value, "not empty", "--out")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("to", ["awq", "torch"])
def test_an_unfinished_run_is_left_alone(quantized, tmp_path, one_line, to):
    from awq_core.checkpoint.writer import CheckpointWriter

    out = tmp_path / "x"
    with pytest.raises(RuntimeError), CheckpointWriter(out) as writer:
        writer.begin({"bits": 4})
        writer.add("a", torch.zeros(8))
        writer.commit("one", {})
        raise RuntimeError
    before = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(OutputError) as caught:
        export_checkpoint(quantized, out, to)
    one_line(caught.value, "unfinished run")
    assert sorted(path.name for path in out.rglob("*")) == before


@pytest.mark.parametrize("to", ["gptq_v2", "torch"])
def test_after_a_kill_it_begins_again(quantized, exported, tmp_path, to):
    """What a killed export leaves: a partial folder without a journal, with files of any kind in it."""
    partial = tmp_path / "x" / ".awq-partial"
    for area in ("parts", "stage"):
        (partial / area).mkdir(parents=True)
        (partial / area / "00001.safetensors").write_bytes(b"half")
    out = export_checkpoint(quantized, tmp_path / "x", to).out
    names = [sorted(path.name for path in folder.iterdir()) for folder in (out, exported(to))]
    assert names[0] == names[1]


def test_a_plugin_that_does_not_claim_it(quantized, tmp_path, one_line):
    with pytest.raises(UnsupportedModelError) as caught:
        export_checkpoint(quantized, tmp_path / "x", "gptq_v2", plugin="qwen")
    one_line(caught.value, "qwen")


def test_a_failure_leaves_nothing(quantized, tmp_path, monkeypatch):
    def broken(name, packed, *, version):
        raise CheckpointError(f"{name} is broken")

    monkeypatch.setattr(gptq, "tensors", broken)
    with pytest.raises(CheckpointError, match="is broken"):
        export_checkpoint(quantized, tmp_path / "x", "gptq")
    assert not (tmp_path / "x").exists()


def test_groups_of_several_sizes(tmp_path, one_line):
    folder = Path(shutil.copytree(FIXTURES / "llmcompressor", tmp_path / "DIR"))
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    other = {**groups["group_0"], "weights": {**groups["group_0"]["weights"], "group_size": 64}}
    config["quantization_config"]["config_groups"] = {"group_0": other, "group_1": groups["group_0"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(folder, tmp_path / "x")
    one_line(caught.value, "groups of 32", "of 64")
    assert not (tmp_path / "x").exists()


def test_float16_that_overflows(quantized, tmp_path, one_line, monkeypatch):
    from awq_core.export.source import Source

    linear = Source.linear

    def large(self, name):
        packed = linear(self, name)
        return PackedLinear(packed.qweight, packed.qzeros, torch.full_like(packed.scales, 60000, dtype=torch.float16))

    monkeypatch.setattr(Source, "linear", large)
    with pytest.raises(NumericsError) as caught:
        export_checkpoint(quantized, tmp_path / "x", "scaled-fp16")
    one_line(caught.value, "overflows", "bfloat16")


def test_the_oracle_above_is_one():
    """`random_linear` is what it says: its weight by the definition."""
    codes, zeros, packed = random_linear()
    expected = torch.empty(16, 64)
    for o in range(16):
        for i in range(64):
            expected[o, i] = (codes[o, i] - zeros[o, i // 32]) * packed.scales[i // 32, o].float()
    assert torch.equal(dequantize(packed), expected) and torch.equal(unpack(packed.qweight).t(), codes)
