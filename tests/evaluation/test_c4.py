"""C4's two protocols: the windows against GPTQ's procedure written out, the number against a plain loop."""

import math
import random

import pytest
import torch

from awq_core.errors import CalibrationError, ConfigError
from awq_core.evaluation import c4_perplexity
from awq_core.evaluation.c4 import NEW_DOCUMENTS, joined_windows, random_windows


@pytest.fixture(scope="module")
def documents():
    draw = random.Random(3)
    return [" ".join(f"w{draw.randrange(1, 40)}" for _ in range(draw.randrange(1, 30))) for _ in range(50)]


def encoded(text):
    return [0, *(int(word[1:]) for word in text.split())]


def test_random_windows_are_those_of_gptq(tokenizer, documents):
    """`random.seed(0)`; a document until one is long enough; a place in it; all with inclusive `randint`."""
    state = random.getstate()
    random.seed(0)
    expected = []
    for _ in range(20):
        while True:
            ids = encoded(documents[random.randint(0, len(documents) - 1)])
            if len(ids) > 12:
                break
        start = random.randint(0, len(ids) - 12 - 1)
        expected.append(ids[start : start + 12])
    random.setstate(state)
    assert random_windows(tokenizer, documents, 12, 20).tolist() == expected


def test_joined_windows(tokenizer, documents):
    ids = encoded(" ".join(documents))
    found = joined_windows(tokenizer, documents, 12, 256)
    assert found.tolist() == [ids[i : i + 12] for i in range(0, len(ids) - 11, 12)]
    assert joined_windows(tokenizer, documents, 12, 3).tolist() == found[:3].tolist()


@pytest.mark.parametrize("protocol", ["c4", "c4-new"])
def test_the_number(model, tokenizer, documents, protocol):
    result = c4_perplexity(
        model, tokenizer, ({"text": one} for one in documents), protocol=protocol, window=12, max_windows=4
    )
    make = random_windows if protocol == "c4" else joined_windows
    losses = []
    for ids in make(tokenizer, documents, 12, 4):
        with torch.no_grad():
            log_p = model.eval()(ids[None]).logits[0].double().log_softmax(-1)
        losses.append(-sum(float(log_p[t - 1, ids[t]]) for t in range(1, 12)) / 11)
    assert result.perplexity == pytest.approx(math.exp(math.fsum(losses) / 4), rel=1e-5)
    assert (result.windows, result.window, result.tokens) == (4, 12, 44)
    assert result.protocol.startswith(f"GPTQ's {protocol}: 4 windows of 12 tokens")


def test_only_the_first_documents_are_read(model, tokenizer):
    def endless():
        for number in range(NEW_DOCUMENTS):
            yield {"text": f"w{number % 39 + 1}"}
        raise AssertionError("read too far")

    result = c4_perplexity(model, tokenizer, endless(), protocol="c4-new", window=16, max_windows=2)
    assert f"{NEW_DOCUMENTS} documents" in result.protocol


def test_documents_that_are_too_short(model, tokenizer, monkeypatch):
    monkeypatch.setattr("awq_core.evaluation.c4.PATIENCE", 50)
    for protocol in ("c4", "c4-new"):
        with pytest.raises(CalibrationError, match="window"):
            c4_perplexity(model, tokenizer, [{"text": "w1 w2"}], protocol=protocol, window=16)
    with pytest.raises(CalibrationError):
        c4_perplexity(model, tokenizer, [], window=16)
    with pytest.raises(ConfigError, match="c4-new"):
        c4_perplexity(model, tokenizer, [{"text": "w1"}], protocol="ptb")
