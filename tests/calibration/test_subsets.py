"""Choosing parts of a mixed corpus, and counting what of it was used."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from awq_core.calibration import Subsets, read_samples, text_batches
from awq_core.calibration.subsets import shares
from awq_core.errors import CalibrationError


def row(text, subset):
    return {"text": text, "meta": {"pile_set_name": subset}}


ROWS = [row("one", "ArXiv"), row("two", "Github"), row("three", "DM Mathematics"), row("four", "ArXiv")]


@pytest.fixture(params=["pile.jsonl", "pile.jsonl.zst", "pile.parquet"])
def pile(request, tmp_path):
    path = tmp_path / request.param
    text = "".join(json.dumps(one) + "\n" for one in ROWS)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("include", "exclude", "texts"),
    [
        (None, None, ["one", "two", "three", "four"]),
        ("ArXiv", None, ["one", "four"]),
        ("arxiv, dm mathematics", None, ["one", "three", "four"]),
        (None, "ArXiv", ["two", "three"]),
        ("ArXiv,Github", "arxiv", ["two"]),
    ],
)
def test_selection(pile, include, exclude, texts):
    samples = list(read_samples(pile, subsets=Subsets.parse(include, exclude)))
    assert [one["text"] for one in samples] == texts
    assert all(one["pile_set_name"] in ("ArXiv", "Github", "DM Mathematics") for one in samples)


def test_nothing_chosen_names_what_there_is(pile):
    with pytest.raises(CalibrationError) as caught:
        list(read_samples(pile, subsets=Subsets(include=("Arxive",))))
    assert "ArXiv, DM Mathematics, Github" in str(caught.value)


def test_rows_without_a_subset_are_refused_only_where_one_is_chosen(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "meta": "a string"}\n')
    assert list(read_samples(path)) == [{"text": "x"}]
    with pytest.raises(CalibrationError, match=r"sample 1 names no subset"):
        list(read_samples(path, subsets=Subsets(exclude=("ArXiv",))))


def test_a_subsets_name_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row("  ", "ArXiv")) + "\n")
    with pytest.raises(CalibrationError, match="holds no text"):
        list(read_samples(path))


class Words:
    """A token a word, and a beginning-of-text token."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": [0] * add_special_tokens + [int(word) for word in text.split()]}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mixture_is_counted_in_tokens_of_the_windows_used(seed):
    """Every token says which subset it is of: 100s are A's, 200s B's; a beginning-of-text 0 is its document's."""
    draw, rows = random.Random(seed), []
    for _ in range(60):
        name = draw.choice("AB")
        first = {"A": 100, "B": 200}[name]
        rows.append(row(" ".join(str(first + draw.randrange(9)) for _ in range(draw.randrange(0, 30))), name))
    data = text_batches(rows, Words(), n_samples=5, seq_len=7, seed=seed)
    plain = text_batches([{"text": one["text"]} for one in rows], Words(), n_samples=5, seq_len=7, seed=seed)
    tokens = [int(t) for batch in data.batches for t in batch["input_ids"].flatten()]
    assert tokens == [int(t) for batch in plain.batches for t in batch["input_ids"].flatten()] and plain.mixture == ()
    counts, starts = dict(data.mixture), sum(token == 0 for token in tokens)
    assert sum(counts.values()) == data.tokens == 35
    a, b = (sum(first <= token < first + 100 for token in tokens) for first in (100, 200))
    assert a <= counts.get("A", 0) <= a + starts and b <= counts.get("B", 0) <= b + starts


def test_the_mixture_exactly():
    rows = [row("1 1 1", "A"), row("", "B"), {"text": "2 2"}, row("3 3 3 3 3 3", "A")]  # 4 + 0 + 3 + 7 tokens
    data = text_batches(rows, Words(), n_samples=7, seq_len=2)
    assert data.mixture == (("A", 11), ("no subset", 3))
    assert shares(data.mixture) == "A 78.6%, no subset 21.4%"
