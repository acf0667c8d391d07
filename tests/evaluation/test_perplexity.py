"""Perplexity against a loop that predicts one token at a time from its prefix, in float64."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

from awq_core.errors import CalibrationError, ConfigError, NumericsError
from awq_core.evaluation import PerplexityResult, perplexity
from awq_core.evaluation.perplexity import CHUNK


def next_token_probabilities(model, prefix):
    """The definition: a softmax over the last position's logits."""
    with torch.no_grad():
        logits = [float(x) for x in model.eval()(torch.tensor([prefix])).logits[0, -1]]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def slow_nll(model, ids, window, max_windows=None):
    """Mean over windows of the mean of -log p."""
    starts = [i for i in range(0, len(ids), window) if i + window <= len(ids)][:max_windows]
    means = []
    for start in starts:
        part = ids[start : start + window]
        losses = [-math.log(next_token_probabilities(model, part[:t])[part[t]]) for t in range(1, window)]
        means.append(math.fsum(losses) / len(losses))
    return math.fsum(means) / len(means)


@pytest.mark.parametrize(("window", "max_windows", "windows"), [(12, None, 3), (12, 2, 2), (12, 9, 3), (37, None, 1)])
def test_against_the_definition(model, tokenizer, text, ids, window, max_windows, windows):
    result = perplexity(model, tokenizer, text, window=window, max_windows=max_windows)
    expected = slow_nll(model, ids, window, max_windows)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.windows, result.window, result.tokens) == (windows, window, windows * (window - 1))
    assert f"{windows} non-overlapping windows of {window} tokens" in result.protocol
    assert result.protocol.startswith("the first") == (max_windows == 2)


def test_a_short_text_is_one_short_window(model, tokenizer, text, ids):
    result = perplexity(model, tokenizer, text, window=50)
    assert result.nll == pytest.approx(slow_nll(model, ids, len(ids)), rel=1e-5)
    assert (result.windows, result.window, result.tokens) == (1, 37, 36)
    assert result.protocol == "one window of 37 tokens, the whole text"


class Bigram(torch.nn.Module):
    """Logits that depend on the last token only."""

    def __init__(self, table, **config):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = SimpleNamespace(**config)
        self.shapes = []

    def forward(self, input_ids, use_cache):
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def uniform(size=40):
    return torch.zeros(size, size)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tokenizer, text):
    assert perplexity(Bigram(uniform()), tokenizer, text).perplexity == pytest.approx(40)


@pytest.mark.parametrize(
    ("config", "wanted", "used"),
    [
        ({}, None, 2048),
        ({"max_position_embeddings": 100}, None, 100),
        ({"max_position_embeddings": 100}, 300, 100),
        ({"n_positions": 4096}, None, 2048),
        ({"n_positions": 4096}, 1500, 1500),
        ({"get_text_config": lambda: SimpleNamespace(max_position_embeddings=64)}, None, 64),
    ],
)
def test_the_window_is_2048_or_the_models_context(tokenizer, config, wanted, used):
    model = Bigram(uniform(), **config)
    result = perplexity(model, tokenizer, "w3 " * 2100, window=wanted)
    assert result.window == used
    assert model.shapes == [(1, used)] * (2101 // used)


def test_logits_are_taken_to_fp32_in_chunks(tokenizer, monkeypatch):
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    text = " ".join(f"w{1 + i * i % 39}" for i in range(2 * CHUNK + 50))
    sizes = []
    log_softmax = torch.Tensor.log_softmax

    def spy(self, *args):
        sizes.append((len(self), self.dtype))
        return log_softmax(self, *args)

    monkeypatch.setattr(torch.Tensor, "log_softmax", spy)
    result = perplexity(Bigram(table), tokenizer, text)
    monkeypatch.undo()
    assert sizes == [(CHUNK, torch.float32), (CHUNK, torch.float32), (50, torch.float32)]
    ids = [0, *(1 + i * i % 39 for i in range(2 * CHUNK + 50))]
    rows = table.double().log_softmax(-1).tolist()
    expected = -math.fsum(rows[a][b] for a, b in itertools.pairwise(ids)) / (len(ids) - 1)
    assert result.nll == pytest.approx(expected, rel=1e-6)


def test_sources(model, tokenizer, text, tmp_path):
    path = tmp_path / "held.txt"
    path.write_text(text)
    expected = perplexity(model, tokenizer, text, window=12)
    assert perplexity(model, tokenizer, path, window=12) == expected
    assert perplexity(model, tokenizer, str(path), window=12) == expected
    half = len(text.split()) // 2
    documents = [" ".join(text.split()[:half]), " ".join(text.split()[half:])]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    assert perplexity(model, tokenizer, tmp_path / "held.jsonl", window=12) == expected
    assert perplexity(model, tokenizer, documents, window=12) == expected


def test_progress_and_result(model, tokenizer, text):
    calls = []
    result = perplexity(model, tokenizer, text, window=12, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert isinstance(result, PerplexityResult)
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == 33


def test_training_mode_is_restored_and_dropout_off(model, tokenizer, text):
    expected = perplexity(model.eval(), tokenizer, text)
    model.train()
    model.lm_head.eval()
    try:
        assert perplexity(model, tokenizer, text) == expected
        assert model.training and model.model.training and not model.lm_head.training
    finally:
        model.eval()


def test_bad_input(model, tokenizer, text, tmp_path):
    with pytest.raises(CalibrationError, match="1 tokens; at least 2"):
        perplexity(model, tokenizer, "")
    with pytest.raises(CalibrationError, match="no such"):
        perplexity(model, tokenizer, tmp_path / "gone.txt")
    with pytest.raises(CalibrationError, match="no such"):
        perplexity(model, tokenizer, "gone.txt")
    with pytest.raises(ConfigError, match="window=1"):
        perplexity(model, tokenizer, text, window=1)
    with pytest.raises(ConfigError, match="max_windows=0"):
        perplexity(model, tokenizer, text, max_windows=0)


def test_nan_names_the_window(tokenizer):
    table = uniform()
    table[7] = math.nan
    with pytest.raises(NumericsError, match="window 1 is nan"):
        perplexity(Bigram(table), tokenizer, "w1 w2 w3 w4 w7 w8 w9", window=4)
