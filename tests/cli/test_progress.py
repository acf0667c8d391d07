"""Progress as lines and as a bar."""

import json

import pytest

from awq_core.api import Phase
from awq_core.cli import progress
from awq_core.cli.output import command_line, duration, plain, plural
from awq_core.quantization.engine import BlockDone

EVENTS = (
    Phase("12 groups proved [ok]"),
    BlockDone("model.layers.0", 1, 3, 20.0, 0.04, 0.01, 1_234_000_000),
    BlockDone("model.layers.1", 2, 3, 40.0, None, None, 999_000_000),
    BlockDone("model.layers.2", 3, 3, 1.2, 0.0, 0.0, 2_000_000_000),
)


def test_lines(capsys):
    with progress.quantizing(False, indent="  ") as receive:
        for event in EVENTS:
            receive(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "  12 groups proved [ok]",
        "  block 1/3  model.layers.0  20 s  40 s left  error 0.04 -> 0.01 (-75%)  1.2 GB in use",
        "  block 2/3  model.layers.1  40 s  30 s left  999.0 MB in use",
        "  block 3/3  model.layers.2  1.2 s  error 0 -> 0  2.0 GB in use",
    ]


def test_json_lines(capsys):
    with progress.quantizing(True) as receive:
        for event in EVENTS[:2]:
            receive(event)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        '{"event": "phase", "text": "12 groups proved [ok]"}',
        '{"event": "block", "path": "model.layers.0", "done": 1, "total": 3, "seconds": 20.0, '
        '"loss_rtn": 0.04, "loss": 0.01, "memory_bytes": 1234000000, "seconds_left": 40.0}',
    ]
    assert captured.err == ""


def test_json_lines_say_the_same_as_the_lines(capsys):
    with progress.quantizing(True) as receive:
        for event in EVENTS:
            receive(event)
    blocks = [json.loads(line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [block["seconds_left"] for block in blocks] == [40.0, 30.0, 0.0]


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(progress, "watched", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_bar(terminal, capsys):
    with progress.quantizing(False) as receive:
        for event in EVENTS:
            receive(event)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "12 groups proved [ok]" in captured.err
    assert "3/3" in captured.err and "20.4 s a block, error 0 -> 0, 2.0 GB in use" in captured.err


def test_windows_are_counted_only_where_somebody_watches(capsys):
    with progress.measuring("perplexity", as_json=False) as receive:
        assert receive is None
    assert capsys.readouterr().err == ""


def test_windows_bar(terminal, capsys):
    with progress.measuring("perplexity of m", as_json=False) as receive:
        receive(1, 2)
        receive(2, 2)
    assert "perplexity of m" in capsys.readouterr().err
    with progress.measuring("perplexity", as_json=True) as receive:
        assert receive is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.004, "4 ms"),
        (0.1, "0.1 s"),
        (9.94, "9.9 s"),
        (42.3, "42 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_small_words(tmp_path):
    assert plural(1, "block") == "1 block" and plural(0, "block") == "0 blocks"
    assert (
        command_line("awq", "generate", "my model", "--prompt", "it's")
        == "awq generate 'my model' --prompt 'it'\"'\"'s'"
    )
    assert plain({1: (float("inf"), tmp_path, "x", 2.5)}) == {"1": [None, str(tmp_path), "x", 2.5]}
