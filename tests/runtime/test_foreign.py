"""Folders written by AutoAWQ, GPTQModel, auto-round and llm-compressor (`fixtures/make.py` says how), loaded.

Two oracles: `peers.layouts`, which the benchmarks read every toolkit's files with and which shares no code with the
loader, and logits that transformers and compressed-tensors computed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from awq_core.cli.app import cli
from awq_core.errors import CheckpointError
from awq_core.evaluation import compare_weights
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load
from awq_core.testing import tiny_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
AUTO_AWQ = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 32,
    "sym": False,
    "data_type": "int",
    "packing_format": "auto_round:auto_awq",
}
OLD_AUTOAWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.fixture
def copy(tmp_path):
    """copy(name, edit): a fixture whose config.json `edit` has changed in place."""

    def copied(name, edit=None):
        folder = Path(shutil.copytree(FIXTURES / name, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        if edit is not None:
            edit(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copied


def section(**values):
    """An edit that puts these settings in place of the old ones."""
    return lambda config: config.update(quantization_config=values)


def weights_of(folder):
    return dict(load(folder, fake_quant=True, dtype="float32").named_parameters())


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_every_toolkit_is_there():
    assert {name.partition("-")[0] for name in FOLDERS} == {"autoawq", "gptqmodel", "autoround", "llmcompressor"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_weights_are_the_toolkits(name, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers.layouts import plain_weights

    expected, found = plain_weights(FIXTURES / name), weights_of(FIXTURES / name)
    assert set(expected) == set(found)
    for key, weight in expected.items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", FOLDERS)
def test_every_linear_runs_in_four_bits(name, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    model = load(FIXTURES / name, dtype="float32")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 7
    ids = torch.arange(8, 40)[None]
    expected = logits(load(FIXTURES / name, dtype="float32", fake_quant=True), ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_the_logits_are_those_of_compressed_tensors():
    stored = load_file(FIXTURES / "llmcompressor-logits.safetensors")
    ids, expected = stored["input_ids"], stored["logits"]
    exact = load(FIXTURES / "llmcompressor", dtype="float32", fake_quant=True)
    torch.testing.assert_close(logits(exact, ids), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        logits(load(FIXTURES / "llmcompressor", dtype="float32"), ids), expected, rtol=1e-4, atol=1e-4
    )


# -- odd folders ------------------------------------------------------------------------------------------------------


def old_file(folder):
    (folder / "quant_config.json").write_text(json.dumps(OLD_AUTOAWQ))


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("autoawq", lambda c: c["quantization_config"].update(version="GEMM", modules_to_not_convert=None)),
        ("autoawq", section(quant_method="awq", w_bit=4, q_group_size=32, zero_point=True, version="GEMM")),
        ("autoawq", lambda c: c.pop("quantization_config")),
        ("autoround", section(**AUTO_AWQ)),  # the same tensors; its other name for them
    ],
)
def test_other_ways_to_say_it(copy, name, edit):
    folder = copy(name, edit)
    if "quantization_config" not in (folder / "config.json").read_text():
        old_file(folder)
    expected = weights_of(FIXTURES / name)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_of(folder).items())


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("autoawq", lambda c: c["quantization_config"].update(version="gemv"), ("'gemv'", "only 'gemm'")),
        ("autoawq", section(quant_method="gptq", bits=4, group_size=32, sym=False), ("qweight has shape",)),
        ("autoawq", lambda c: c["quantization_config"].update(zero_point=False), ("symmetric",)),
        ("gptqmodel-gptq-asym", section(**OLD_AUTOAWQ), ("GPTQ layout",)),
        ("autoround-own-symmetric", section(**OLD_AUTOAWQ), ("GPTQ layout",)),
        ("llmcompressor", section(**OLD_AUTOAWQ), ("no weights for 7 tensors",)),
        ("llmcompressor", lambda c: c.pop("quantization_config"), ("no weights for 7 tensors",)),
        (
            "llmcompressor-symmetric",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False),
            ("weight_zero_point is missing",),
        ),
        (
            "llmcompressor-channel",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(
                strategy="group", group_size=32
            ),
            ("1 groups in 64", "groups of 32"),
        ),
        ("llmcompressor", lambda c: c.update(intermediate_size=64), ("128 x 64, the model needs 64 x 64",)),
    ],
)
def test_a_configuration_that_the_tensors_contradict(copy, name, edit, words, one_line):
    folder = copy(name, edit)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, *words)


def test_a_lost_tensor_is_named(copy, one_line):
    folder = copy("llmcompressor")
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.0.mlp.up_proj.weight_shape"
    tensors.pop(lost)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    one_line(caught.value, lost)


# -- the commands -----------------------------------------------------------------------------------------------------


def test_layouts_are_compared_by_what_they_hold():
    """The same weights in another version of a layout are equal; other weights are as far apart as they are."""
    folder, other = FIXTURES / "gptqmodel-gptq-v2", FIXTURES / "llmcompressor"
    same = compare_weights(folder, FIXTURES / "gptqmodel-gptq-asym")
    assert len(same.linears) == 7 and same.equal and same.group_sizes == (32, 32)
    found = compare_weights(folder, other)
    assert len(found.linears) == 7 and not (found.equal or found.only_a or found.only_b)
    mine, theirs = weights_of(folder), weights_of(other)
    assert set(found.others) == {name for name in mine if "norm" in name and not torch.equal(mine[name], theirs[name])}
    for linear in found.linears:
        a, b = (weights[f"{linear.name}.weight"].double() for weights in (mine, theirs))
        expected = (a - b).norm() / ((a.square().sum() + b.square().sum()) / 2).sqrt()
        assert linear.weight == pytest.approx(float(expected), rel=1e-6) and linear.weight > 0


@pytest.mark.parametrize("name", ["llmcompressor", "autoround-own-symmetric"])
def test_the_commands_take_them(copy, tmp_path, name, corpus):
    folder, text = copy(name), tmp_path / "text.txt"
    tiny_tokenizer(vocabulary=112).save_pretrained(folder)
    text.write_text("\n".join(corpus))

    def awq(*arguments):
        done = CliRunner().invoke(cli, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert awq("generate", folder, "--prompt", "def add", "--max-new-tokens", 3)["new_tokens"] == 3
    measured = awq("eval", folder, "--text", text, "--window", 32, "--max-windows", 4)
    assert measured["perplexity"]["windows"] == 4 and measured["perplexity"]["perplexity"] > 1
    assert len(awq("compare", folder, FIXTURES / "autoawq")["weights"]["linears"]) == 7
