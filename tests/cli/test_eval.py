"""`awq eval`: the numbers of `awq_core.evaluation`, with the text they belong to."""

import pytest
from transformers import AutoTokenizer

import awq_core
from awq_core.calibration import standard_library
from awq_core.cli.eval import eval_text
from awq_core.evaluation import divergence, perplexity


def test_against_the_original(awq, read_json, quantized, llama_source, corpus_file):
    options = ["--text", corpus_file, "--against", llama_source, "--window", 64, "--max-windows", 3]
    data = read_json(awq("eval", quantized, *options, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    text = corpus_file.read_text(encoding="utf-8")
    reference, candidate = awq_core.load(llama_source), awq_core.load(quantized)
    expected = perplexity(candidate, tokenizer, text, window=64, max_windows=3)
    assert data["perplexity"] == expected.to_dict()
    assert data["text"] == "corpus.txt"
    against = data["against"]
    assert against["perplexity"] == perplexity(reference, tokenizer, text, window=64, max_windows=3).to_dict()
    assert against["difference"] == data["perplexity"]["perplexity"] - against["perplexity"]["perplexity"]
    apart = divergence(reference, candidate, tokenizer, text, window=64, max_windows=3)
    assert against["divergence"] == apart.to_dict() and apart.kl_mean > 0


def test_text(awq, quantized, llama_source, corpus_file):
    result = awq("eval", quantized, "--text", corpus_file, "--against", llama_source, "--window", 64)
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "perplexity",
        "original",
        "difference",
        "KL",
        "agreement",
        "protocol",
        "KL",
    ]
    assert "non-overlapping windows of 64 tokens" in result.stdout
    assert "text: corpus.txt" in result.errors


def test_a_single_window_has_no_standard_error(awq, read_json, llama_source, corpus_file):
    options = ["--text", corpus_file, "--against", llama_source, "--window", 64, "--max-windows", 1]
    data = read_json(awq("eval", llama_source, *options, "--json"))
    assert data["against"]["divergence"]["kl_stderr"] is None
    assert data["against"]["difference"] == 0 and data["against"]["divergence"]["top1_agreement"] == 1
    assert "±" not in awq("eval", llama_source, *options).stdout


def test_an_unquantized_model_alone(awq, read_json, llama_source):
    data = read_json(awq("eval", llama_source, "--window", 32, "--max-windows", 2, "--json"))
    assert data["against"] is None
    assert data["text"].startswith("Python standard library source (built-in default)")
    assert (data["perplexity"]["windows"], data["perplexity"]["window"]) == (2, 32)


def test_the_builtin_text_is_what_calibration_reads_last():
    text = eval_text(None, None, 64, 2)
    last = list(standard_library())[-1]["text"]
    assert text.text.startswith(last) and text.windows == 2
    assert len(eval_text(None, None, None, None).text) > 16 * 2048 * 6


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--text", "none.txt"], 1, "none.txt"),
        (["--split", "test"], 2, "--split is for hub datasets"),
        (["--window", 1], 2, "--window"),
    ],
)
def test_failures(awq, llama_source, options, code, words):
    assert words in awq("eval", llama_source, *options, code=code).stderr
