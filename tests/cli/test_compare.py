"""`awq compare`: the numbers of `awq_core.evaluation` for two folders, in text and in JSON."""

import json

import pytest
from transformers import AutoTokenizer

import awq_core
from awq_core.cli.compare_text import verdict
from awq_core.evaluation import compare_models, compare_weights
from awq_core.evaluation.comparison import Comparison
from awq_core.evaluation.paired import Estimate, Pair


@pytest.fixture
def options(llama_source, corpus_file):
    return ["--reference", llama_source, "--text", corpus_file, "--window", 64, "--max-windows", 3]


def test_against_the_original(awq, read_json, quantized, quantized_llama, llama_source, corpus_file, options):
    data = read_json(awq("compare", quantized, quantized_llama, *options, "--json"))
    assert (data["a"], data["b"]) == (str(quantized), str(quantized_llama))
    assert data["weights"] == json.loads(json.dumps(compare_weights(quantized, quantized_llama).to_dict()))
    models = [awq_core.load(folder) for folder in (llama_source, quantized, quantized_llama)]
    text = corpus_file.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(llama_source)
    expected = compare_models(*models, tokenizer, text, window=64, max_windows=3).to_dict()
    reference = {"model": str(llama_source), "text": "corpus.txt", **expected}
    assert data["reference"] == json.loads(json.dumps(reference))
    blocks = data["reference"]["blocks"]
    assert [block["name"] for block in blocks] == ["model.layers.0", "model.layers.1"]
    assert all(0 < block[name] < 1 for block in blocks for name in "ab")


def test_text(awq, quantized, quantized_llama, options):
    result = awq("compare", quantized, quantized_llama, *options)
    for words in ("14 linears quantized in both", "4 more, less different: --all", "model.layers.1", "top-1, %", "±"):
        assert words in result.stdout
    assert "3 windows of 64 tokens" in result.stdout
    assert "closer" in result.stdout.splitlines()[-1] or "cannot be told apart" in result.stdout.splitlines()[-1]
    assert "text: corpus.txt" in result.errors
    everything = awq("compare", quantized, quantized_llama, *options, "--all").stdout
    assert "--all" not in everything and everything.count("self_attn.") == 8


def test_weights_alone(awq, read_json, quantized, quantized_llama):
    data = read_json(awq("compare", quantized, quantized_llama, "--json"))
    assert data["reference"] is None and data["weights"]["codes"] > 0
    result = awq("compare", quantized, quantized_llama)
    assert "of codes differ" in result.stdout and "perplexity" not in result.stdout
    assert result.errors[-1].startswith("next: awq compare") and "--reference" in result.errors[-1]


def test_a_folder_with_itself(awq, read_json, quantized, options):
    assert awq("compare", quantized, quantized).stdout == "weights: the same in all 14 quantized linears\n"
    data = read_json(awq("compare", quantized, quantized, *options, "--json"))
    assert data["weights"]["equal"] and data["weights"]["codes"] == 0
    for name in ("perplexity", "kl", "agreement"):
        assert data["reference"][name]["difference"] == {"mean": 0.0, "stderr": 0.0}
    assert data["reference"]["closer"] is None
    assert "A and B are equally close" in awq("compare", quantized, quantized, *options).stdout


def test_swapped(awq, read_json, quantized, quantized_llama, options):
    one, two = (
        read_json(awq("compare", *pair, *options, "--json"))["reference"]
        for pair in ((quantized, quantized_llama), (quantized_llama, quantized))
    )
    assert one["kl"]["difference"]["mean"] == -two["kl"]["difference"]["mean"]
    assert one["kl"]["a"] == two["kl"]["b"] and one["agreement"]["b"] == two["agreement"]["a"]


def test_one_window_has_no_error_bar(awq, read_json, quantized, quantized_llama, options):
    data = read_json(awq("compare", quantized, quantized_llama, *options[:-1], 1, "--json"))
    assert data["reference"]["kl"]["difference"]["stderr"] is None and data["reference"]["closer"] is None
    text = awq("compare", quantized, quantized_llama, *options[:-1], 1).stdout
    assert "one window has no error bar" in text


def compared(a: float, b: float, error: float) -> Comparison:
    kl = Pair(Estimate(a, 0.0008), Estimate(b, 0.0011), Estimate(a - b, error))
    return Comparison(Estimate(8.0, 0.1), kl, kl, kl, (), 64, 2, 32, 0)


def test_the_verdict():
    assert verdict(compared(0.0233, 0.0345, 0.0006)) == (
        "A is closer: KL 0.0233 ± 0.0008 against 0.0345 ± 0.0011, difference -0.0112 ± 0.0006"
    )
    assert verdict(compared(0.0345, 0.0233, 0.0006)) == (
        "B is closer: KL 0.0233 ± 0.0011 against 0.0345 ± 0.0008, difference -0.0112 ± 0.0006"
    )
    assert verdict(compared(0.0345, 0.0341, 0.0003)) == (
        "A and B cannot be told apart: KL 0.0345 ± 0.0008 and 0.0341 ± 0.0011, difference +0.0004 ± 0.0003 "
        "(less than 2 standard errors)"
    )


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["--text", "notes.txt"], 2, "--text needs --reference"),
        (["--window", 64], 2, "--window needs --reference"),
        (["--reference", "none/none/none"], 1, "no such model folder"),
    ],
)
def test_failures(awq, quantized, typed, code, words):
    assert words in awq("compare", quantized, quantized, *typed, code=code).stderr


def test_a_model_that_is_not_quantized(awq, quantized, llama_source):
    result = awq("compare", quantized, llama_source, code=1)
    assert len(result.errors) == 1 and "not quantized" in result.stderr and "--reference" in result.stderr


def test_another_architecture(awq, quantized, model_folder):
    config = json.loads((quantized / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "other"}))
    result = awq("compare", quantized, model_folder, code=1)
    assert len(result.errors) == 1 and "is a llama" in result.stderr and "a other" in result.stderr
