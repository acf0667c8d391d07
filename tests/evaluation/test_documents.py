"""Bits per byte against a loop over tokens and bytes counted by hand; streaming against a source that never ends."""

import json
import math
import os
import threading

import pytest
import torch

from awq_core.calibration import Subsets, read_samples
from awq_core.errors import CalibrationError, ConfigError, NumericsError
from awq_core.evaluation import bits_per_byte

DOCUMENTS = [
    ("w1 w2 w3", "ArXiv"),
    ("w30 w4 w4 w5 w6 w7 w8 w9 w10 w11 w12 w13", "Github"),
    ("ü w3", "ArXiv"),  # two bytes for ü, which is one unknown token
    ("", "Github"),
    ("w7", "HackerNews"),
]
BYTES = {"ArXiv": 13, "Github": 40, "HackerNews": 2}


def samples():
    return [{"text": text, "pile_set_name": name} for text, name in DOCUMENTS]


def slow_bits(model, tokenizer, text, window):
    """Each token from those before it in its window of inputs; the last window ends with the document."""
    words = [0] + [int(word[1:]) if word[0] == "w" else 1 for word in text.split()]
    bits = 0.0
    for t in range(1, len(words)):
        end = min(((t - 1) // window + 1) * window, len(words) - 1)
        start = max(0, end - window)
        with torch.no_grad():
            logits = model.eval()(torch.tensor([words[start:t]])).logits[0, -1].double()
        bits -= float(logits.log_softmax(-1)[words[t]]) / math.log(2)
    return bits


@pytest.mark.parametrize("window", [4, 5, 64])
def test_against_the_definition(model, tokenizer, window):
    result = bits_per_byte(model, tokenizer, samples(), window=window)
    for name in BYTES:
        texts = [text for text, subset in DOCUMENTS if subset == name and text]
        bits = math.fsum(slow_bits(model, tokenizer, text, window) for text in texts)
        part = result.subsets[name]
        assert part.bits_per_byte == pytest.approx(bits / BYTES[name], rel=1e-5)
        assert (part.bytes, part.documents) == (BYTES[name], len(texts))
        alone = bits_per_byte(model, tokenizer, samples(), subsets=Subsets(include=(name,)), window=window)
        assert alone.total == part and list(alone.subsets) == [name]
    shares = {name: row["weight"] for name, row in result.to_dict()["subsets"].items()}
    weighted = math.fsum(shares[name] * part.bits_per_byte for name, part in result.subsets.items())
    assert result.total.bits_per_byte == pytest.approx(weighted, rel=1e-12)
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert result.total.tokens == 3 + 12 + 2 + 1 and f"windows of {window} tokens" in result.protocol


def test_bytes_by_hand(model, tokenizer):
    found = {name: bits.bytes for name, bits in bits_per_byte(model, tokenizer, samples()).subsets.items()}
    # "w1 w2 w3" is 8, "ü w3" is 2 + 1 + 2; the long one has 7 words of 2 bytes, 5 of 3, and 11 spaces; "w7" is 2.
    assert found == {"ArXiv": 8 + 5, "Github": 7 * 2 + 5 * 3 + 11, "HackerNews": 2}


def test_exclude_and_limits(model, tokenizer):
    rest = bits_per_byte(model, tokenizer, samples(), subsets=Subsets(exclude=("arxiv",)))
    assert set(rest.subsets) == {"Github", "HackerNews"}
    first = bits_per_byte(model, tokenizer, samples(), max_documents=2)
    assert first.total.documents == 2 and first.protocol.startswith("the first 2 documents")
    plain = bits_per_byte(model, tokenizer, [{"text": "w1 w2 w3"}])
    assert plain.subsets == {} and plain.total.bytes == 8


def test_a_tokenizer_without_special_tokens(model, tokenizer):
    class Bare:
        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    result = bits_per_byte(model, Bare(), [{"text": "w1 w2 w3"}])
    assert (result.total.tokens, result.total.bytes) == (2, 8) and "first token not counted" in result.protocol


def test_a_generator_is_read_no_further_than_asked(model, tokenizer):
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": "w1 w2"}

    assert bits_per_byte(model, tokenizer, endless(), max_documents=3).total.documents == 3
    assert len(read) == 3


def test_a_file_is_streamed(model, tokenizer, tmp_path):
    """A pipe that is written while it is read: the writer is never more than a buffer ahead of the last document."""
    pipe = tmp_path / "pile.jsonl"
    os.mkfifo(pipe)
    line = (json.dumps({"text": "w1 w2", "meta": {"pile_set_name": "ArXiv", "pad": "x" * 10_000}}) + "\n").encode()
    written, done, ahead = 0, 0, 0

    def write():
        nonlocal written
        with open(pipe, "wb", buffering=0) as file:
            for _ in range(200):
                file.write(line)
                written += 1

    def progress(documents, of):
        nonlocal done, ahead
        done, ahead = documents, max(ahead, written - documents)

    writer = threading.Thread(target=write)
    writer.start()
    result = bits_per_byte(model, tokenizer, read_samples(pipe), progress=progress)
    writer.join()
    assert result.total.documents == done == written == 200
    assert ahead < 60  # of 200: a pipe holds 64 KiB, a text stream some more


@pytest.mark.parametrize(
    ("rows", "options", "error"),
    [
        ([], {}, CalibrationError),
        ([{"text": ""}], {}, CalibrationError),
        ([{"text": "w1"}], {"subsets": Subsets(include=("ArXiv",))}, CalibrationError),
        ([{"text": "w1"}], {"max_documents": 0}, ConfigError),
        ([{"text": "w1"}], {"window": 1}, ConfigError),
    ],
)
def test_bad_input(model, tokenizer, rows, options, error):
    with pytest.raises(error):
        bits_per_byte(model, tokenizer, rows, **options)


def test_nan_is_refused(tokenizer):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, use_cache):
            return type("Output", (), {"logits": torch.full((*input_ids.shape, 40), math.nan)})

    with pytest.raises(NumericsError):
        bits_per_byte(Broken(), tokenizer, [{"text": "w1 w2"}])
