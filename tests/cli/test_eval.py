"""`awq eval`: the numbers of `awq_core.evaluation`, with the text they belong to."""

import json
import sys
from types import SimpleNamespace

import pytest
import zstandard
from transformers import AutoTokenizer

import awq_core
from awq_core.calibration import standard_library
from awq_core.cli.eval_text import eval_text
from awq_core.evaluation import bits_per_byte, c4_perplexity, divergence, perplexity, sliding_perplexity


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
        "KL",
        "agreement",
        "top",
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
        (["--gate", "kl<0.02"], 2, "--against"),
        (["--gate", "kl"], 2, "is no gate"),
        (["--gate", "pppl<9"], 2, "known here: ppl"),
        (["--bits-per-byte"], 2, "--bits-per-byte needs --text"),
        (["--include", "ArXiv"], 2, "--include is of --bits-per-byte"),
        (["--max-documents", 3], 2, "--max-documents is of --bits-per-byte"),
        (["--cache", "x"], 2, "--against"),
        (["--cache-limit", "1GB"], 2, "--cache-limit is of --cache"),
        (["--cache", "x", "--against", "y", "--cache-limit", "much"], 2, "'much' is no size"),
        (["--stride", 8, "--protocol", "c4"], 2, "--stride"),
        (["--stride", 64, "--window", 32], 2, "stride=64"),
        (["--protocol", "c4"], 2, "need --text"),
        (["--tasks", "none.py:f"], 2, "no such file"),
        (["--tasks", "none.py"], 2, "none.py names no function"),
        (["--tasks", " , "], 2, "--tasks names none"),
        (["--task-folder", "x"], 2, "--task-folder needs --tasks"),
    ],
)
def test_failures(awq, llama_source, options, code, words):
    assert words in awq("eval", llama_source, *options, code=code).stderr


def test_a_wrong_original_is_said_before_anything_is_measured(awq, llama_source, corpus_file, monkeypatch):
    monkeypatch.setattr("awq_core.cli.models.open_model", lambda *args, **kwargs: pytest.fail("a model was opened"))
    for options in (["--text", corpus_file], ["--text", corpus_file, "--bits-per-byte"]):
        failed = awq("eval", llama_source, *options, "--against", "./nowhere", code=1)
        assert "./nowhere: no such model" in failed.stderr
    assert "no config.json" in awq("eval", corpus_file.parent, "--text", corpus_file, code=1).stderr


PILE = [("one two three", "ArXiv"), ("x = 1\n" * 40, "Github"), ("ü", "ArXiv")]


@pytest.fixture
def pile(tmp_path):
    rows = ({"text": text, "meta": {"pile_set_name": name}} for text, name in PILE)
    path = tmp_path / "pile.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def test_sliding(awq, read_json, quantized, corpus_file):
    options = ["--text", corpus_file, "--window", 64]
    data = read_json(awq("eval", quantized, *options, "--stride", 16, "--json"))
    tokenizer, model = AutoTokenizer.from_pretrained(quantized), awq_core.load(quantized)
    text = corpus_file.read_text(encoding="utf-8")
    assert data["perplexity"] == sliding_perplexity(model, tokenizer, text, window=64, stride=16).to_dict()
    named = read_json(awq("eval", quantized, *options, "--protocol", "sliding", "--max-windows", 2, "--json"))
    assert "stride 32" in named["perplexity"]["protocol"]  # half of a window of 64


@pytest.mark.parametrize("protocol", ["c4", "c4-new"])
def test_c4_of_a_local_file(awq, read_json, quantized, tmp_path, corpus, protocol):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text * 3}) + "\n" for text in corpus))
    options = ["--text", path, "--protocol", protocol, "--window", 32, "--max-windows", 2]
    data = read_json(awq("eval", quantized, *options, "--json"))
    tokenizer, model = AutoTokenizer.from_pretrained(quantized), awq_core.load(quantized)
    expected = c4_perplexity(
        model, tokenizer, [{"text": text * 3} for text in corpus], protocol=protocol, window=32, max_windows=2
    )
    assert data["perplexity"] == expected.to_dict()


@pytest.mark.parametrize(
    ("name", "dataset", "split", "text"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1"), "test", "a\n\n\n\nb"),
        ("c4", ("allenai/c4", "en"), "validation", "a  b"),
        ("c4-new", ("allenai/c4", "en"), "validation", "a  b"),
    ],
)
def test_named_texts_come_from_the_hub(monkeypatch, tmp_path, name, dataset, split, text):
    asked = []

    def load_dataset(repo, config, *, split, streaming):
        asked.append((repo, config, split, streaming))
        return [{"text": "a"}, {"text": ""}, {"text": "b"}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = eval_text(name, None, None, None, c4=name != "wikitext2")
    assert asked == [(*dataset, split, True)]
    assert found.text == text and found.name.endswith(f"split {split}")
    assert len(found.documents) == (0 if name == "wikitext2" else 3)


def test_offline_is_one_line(awq, llama_source, monkeypatch, tmp_path):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no network\nat all")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (line,) = awq("eval", llama_source, "--text", "wikitext2", code=1).errors[-1:]
    assert "HF_HUB_OFFLINE is set" in line and "wikitext2" in line


def test_bits_per_byte(awq, read_json, quantized, llama_source, pile):
    options = ["--text", pile, "--bits-per-byte", "--window", 64]
    data = read_json(awq("eval", quantized, *options, "--against", llama_source, "--json"))
    assert data["perplexity"] is None and data["text"] == "pile.jsonl.zst"
    found = data["bits_per_byte"]
    tokenizer, model = AutoTokenizer.from_pretrained(quantized), awq_core.load(quantized)
    rows = [{"text": text, "pile_set_name": name} for text, name in PILE]
    for part, folder in ((found, quantized), (found["against"], llama_source)):
        expected = bits_per_byte(awq_core.load(folder), tokenizer, rows, window=64).to_dict()
        assert {key: part[key] for key in expected} == expected
    assert found["bytes"] == 13 + 240 + 2 and found["subsets"]["ArXiv"]["bytes"] == 15
    only = read_json(awq("eval", quantized, *options, "--include", "github", "--json"))["bits_per_byte"]
    assert only["subsets"] == {"Github": {**found["subsets"]["Github"], "weight": 1.0}}
    rest = read_json(awq("eval", quantized, *options, "--exclude", "Github", "--max-documents", 1, "--json"))
    assert (rest["bits_per_byte"]["bytes"], rest["bits_per_byte"]["against"]) == (13, None)
    assert bits_per_byte(model, tokenizer, rows[:1], window=64).total.bytes == 13
    shown = awq("eval", quantized, *options, "--against", llama_source).stdout.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["ArXiv", "Github", "bits per byte", "protocol"]


def test_the_cache_spares_the_original(awq, read_json, quantized, llama_source, corpus_file, tmp_path, monkeypatch):
    options = ["--text", corpus_file, "--against", llama_source, "--window", 64, "--max-windows", 3]
    plain = read_json(awq("eval", quantized, *options, "--json"))
    opened = []
    load = awq_core.load
    monkeypatch.setattr(awq_core, "load", lambda name, **kwargs: opened.append(str(name)) or load(name, **kwargs))
    for originals in (1, 0):
        opened.clear()
        result = awq("eval", quantized, *options, "--cache", tmp_path / "kept", "--json")
        assert read_json(result) == plain
        assert opened.count(str(llama_source)) == originals
    assert "it was not opened" in result.stderr
    assert "is no size" in awq("eval", quantized, *options, "--cache", tmp_path, "--cache-limit", "x", code=2).stderr
    small = awq("eval", quantized, *options, "--cache", tmp_path / "small", "--cache-limit", "1KB", code=2)
    assert "the cache's limit" in small.stderr


def test_gates(awq, read_json, quantized, llama_source, corpus_file):
    options = ["--text", corpus_file, "--against", llama_source, "--window", 64, "--max-windows", 2]
    met = awq("eval", quantized, *options, "--gate", "kl<10", "--gate", "top5 > 1%", "--gate", "ppl_increase<1000%")
    assert met.stdout.count(": met") == 3
    failed = awq("eval", quantized, *options, "--gate", "kl<10", "--gate", "kl<1e-9", "--json", code=5)
    data = read_json(failed)
    assert [(gate["gate"], gate["met"]) for gate in data["gates"]] == [("kl<10", True), ("kl<1e-9", False)]
    assert data["gates"][1]["value"] == data["against"]["divergence"]["kl_mean"]
    (line,) = failed.errors[-1:]
    assert "kl<1e-9 is not met" in line and "kl<10 " not in line
    increase = data["perplexity"]["perplexity"] / data["against"]["perplexity"]["perplexity"] - 1
    shown = awq("eval", quantized, *options, "--gate", f"ppl_increase<{increase:.17g}", code=5).stdout
    assert "NOT MET" in shown


def test_tasks_of_ones_own(awq, read_json, quantized, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def size(model, tokenizer):\n    return {'vocabulary': len(tokenizer)}\n")
    data = read_json(awq("eval", quantized, "--tasks", f"{path}:size", "--gate", "size.vocabulary>=1", "--json"))
    assert data["perplexity"] is None
    size = len(AutoTokenizer.from_pretrained(quantized))
    assert data["tasks"]["metrics"] == {"size.vocabulary": {"value": size, "stderr": None}}
    shown = awq("eval", quantized, "--tasks", f"{path}:size", "--gate", "size.vocabulary<1", code=5).stdout
    assert shown.splitlines()[0].split() == ["size.vocabulary", f"{size:.4f}"]
    late = awq("eval", quantized, "--tasks", f"{path}:size", "--gate", "size.words<1", code=2)
    assert "known here: size.vocabulary" in late.stderr
