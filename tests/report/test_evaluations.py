"""Evaluations as tables: the figures that are known, those that are not, and documents of any maker."""

import json

import pytest

from awq_core.errors import ConfigError
from awq_core.report.evaluations import MOST, named, read_evaluation, table, title

DOCUMENT = {
    "model": "/somebody/out",
    "text": "notes.txt",
    "perplexity": {
        "perplexity": 8.25,
        "nll": 2.11,
        "tokens": 300,
        "windows": 3,
        "window": 101,
        "protocol": "by windows",
    },
    "against": {
        "model": "/somebody/models/base",
        "perplexity": {"perplexity": 8.0, "nll": 2.08, "tokens": 300, "windows": 3, "window": 101, "protocol": "same"},
        "difference": 0.25,
        "divergence": {
            "kl_mean": 0.0312,
            "kl_stderr": 0.0004,
            "kl_median": 0.01,
            "kl_p999": 0.4,
            "top1_agreement": 0.915,
            "top5_agreement": 0.88,
            "tokens": 600,
            "windows": 6,
            "window": 100,
        },
    },
}


def test_what_awq_eval_prints():
    found = table(named(DOCUMENT))
    assert title(DOCUMENT) == "notes.txt"
    assert found.rows == (
        ("perplexity", "8.0000", "8.2500", "+0.2500 (+3.12%)"),
        ("KL divergence, nats a token", "0", "0.03120 ± 0.00040", "-"),
        ("KL, median", "0", "0.01000", "-"),
        ("KL, 99.9 % of tokens are below", "0", "0.40000", "-"),
        ("same likeliest token", "100%", "91.50%", "-"),
        ("shared among the five likeliest", "100%", "88.00%", "-"),
    )
    for words in ("Original: base.", "by windows; 300 tokens", "6 windows of 100 tokens"):
        assert words in found.note


def test_intervals_take_the_place_of_the_error():
    document = json.loads(json.dumps(DOCUMENT))
    document["against"]["divergence"]["intervals"] = {"kl_mean": [0.03, 0.0325], "top1_agreement": [0.91, 0.92]}
    rows = dict((row[0], row[2]) for row in table(document).rows)
    assert rows["KL divergence, nats a token"] == "0.03120 (0.03000 to 0.03250)"
    assert rows["same likeliest token"] == "91.50% (91.00% to 92.00%)" and len(rows) == 6


def test_perplexity_alone():
    found = table({"text": "t", "perplexity": {"perplexity": 3.0}, "against": None})
    assert found.rows == (("perplexity", "-", "3.0000", "-"),)


def test_titles():
    metrics = {"arc.acc": {"value": 0.5}, "arc.acc_norm": {"value": 0.5}, "mmlu.acc": {"value": 0.5}}
    assert title({"text": "notes", "tasks": {"metrics": metrics}}) == "notes"
    assert title({"text": None, "tasks": {"metrics": metrics}}) == "arc, mmlu"
    assert title({"text": None, "images": {"source": "photos"}}) == "photos"
    assert title({"text": None, "tasks": {"metrics": [1]}, "images": 3}) == title({}) == "evaluation"


def test_what_is_not_known_is_listed():
    document = {
        **DOCUMENT,
        "tasks": {"arc": {"acc": 0.25, "n": 12}},
        "list": [1, {"a": "b"}],
        "empty": "",
        "none": None,
    }
    rows = table(document).rows[6:]
    assert rows == (
        ("tasks.arc.acc", "-", "0.25", "-"),
        ("tasks.arc.n", "-", "12", "-"),
        ("list[0]", "-", "1", "-"),
        ("list[1].a", "-", "b", "-"),
    )
    many = table({"text": "t", "values": list(range(MOST + 7))})
    assert len(many.rows) == MOST and "7 more figures" in many.note


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"perplexity": 3, "against": "base"},
        {"perplexity": {"perplexity": "low"}, "against": {"perplexity": [1], "divergence": {"kl_mean": True}}},
        {
            "perplexity": {"perplexity": 2.0},
            "against": {"perplexity": {"perplexity": 0}, "divergence": {"kl_p999": 0.5}},
        },
        {"perplexity": {"perplexity": 2.0}, "against": {"divergence": {"kl_mean": 0.1, "intervals": {"kl_mean": [1]}}}},
        {"text": ["a"], "against": {"divergence": {"kl_mean": 0.1, "intervals": [1, 2]}}},
    ],
)
def test_any_shape_gives_a_table(document):
    found = table(document)
    assert all(len(row) == 4 and all(isinstance(cell, str) for cell in row) for row in found.rows)


def test_a_path_is_cut_to_its_name():
    found = named({"model": "/a/b/c", "others": ["~/x/y", "../z", "org/name", 3]})
    assert found == {"model": "c", "others": ["y", "z", "org/name", 3]}


def test_files(tmp_path, one_line):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(DOCUMENT))
    assert read_evaluation(path) == named(DOCUMENT)
    path.write_text('{"perplexity": {"perplexity": NaN}}')
    assert read_evaluation(path) == {"perplexity": {"perplexity": None}}
    for text in (
        "",
        "[]",
        "3",
        "{",
        "[" * 100_000,
        '{"error": "no model", "exit_code": 1}',
        "\x80",
    ):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ConfigError) as caught:
            read_evaluation(path)
        one_line(caught.value, "eval.json", "awq eval")
    for missing in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError) as caught:
            read_evaluation(missing)
        one_line(caught.value, missing.name)
