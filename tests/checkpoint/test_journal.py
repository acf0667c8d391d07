"""The journal: what is read is what was written, and a line that is not whole does not count."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from awq_core.checkpoint.journal import Journal, Part, Unit, differences, plain
from awq_core.errors import OutputError

IDENTITY = {"model": "ü", "search": {"grid": 20}}
UNITS = [
    Unit("layers.0", {"loss": 0.1 + 0.2, "tiny": 5e-324, "text": "é\n"}, (Part("00001", 300, 200, ("b", "a")),)),
    Unit("empty", {}, ()),
    Unit("layers.1", {"big": 2**70}, (Part("00002", 30, 20, ("c",)), Part("00003", 3, 0, ("d",)))),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal.create(tmp_path / "journal.jsonl", IDENTITY)
    for unit in UNITS:
        journal.append(unit)
    assert journal.units == UNITS
    return tmp_path / "journal.jsonl"


def load(path: Path) -> Journal:
    journal = Journal.load(path)
    assert journal is not None
    return journal


def test_what_is_read_is_what_was_written(path: Path) -> None:
    journal = load(path)
    assert (journal.identity, journal.units) == (IDENTITY, UNITS)
    assert [set(json.loads(line)) for line in path.read_text().splitlines()] == [
        {"identity", "sha256"},
        *[{"key", "payload", "parts", "sha256"}] * 3,
    ]


def test_nan_and_infinity(path: Path) -> None:
    journal = load(path)
    journal.append(Unit("odd", {"values": [math.nan, math.inf, -0.0]}, ()))
    values = load(path).units[-1].payload["values"]
    assert math.isnan(values[0]) and values[1] == math.inf and math.copysign(1, values[2]) == -1


def test_cut_anywhere(path: Path) -> None:
    """Each whole line counts, and nothing else; what is appended then takes the place of the rest."""
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for size in range(len(data)):
        path.write_bytes(data[:size])
        lines = sum(end <= size for end in ends)
        journal = Journal.load(path)
        if not lines:
            assert journal is None
            continue
        assert journal is not None and journal.units == UNITS[: lines - 1]
        for unit in UNITS[lines - 1 :]:
            journal.append(unit)
        assert path.read_bytes() == data


def test_a_changed_line_ends_the_journal(path: Path) -> None:
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for old, new in ((b"empty", b"Empty"), (b'"parts":[]', b'"parts": []'), (b"sha256", b"sha255")):
        changed = lines[2].replace(old, new)
        assert changed != lines[2]
        path.write_bytes(b"".join([*lines[:2], changed, lines[3]]))
        assert load(path).units == UNITS[:1]
    path.write_bytes(b"\0" * 4096 + data)
    assert Journal.load(path) is None


def test_no_journal(tmp_path: Path) -> None:
    assert Journal.load(tmp_path / "journal.jsonl") is None


def test_forgetting(path: Path) -> None:
    journal = load(path)
    journal.keep(1)
    assert journal.units == UNITS[:1] == load(path).units
    journal.append(UNITS[1])
    assert load(path).units == UNITS[:2]


def test_an_append_that_failed_can_be_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, before = load(path), path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            journal.append(Unit("long" * 100, {}, ()))
    assert journal.units == UNITS and path.read_bytes() != before
    journal.append(Unit("short", {}, ()))
    assert [unit.key for unit in load(path).units] == ["layers.0", "empty", "layers.1", "short"]


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, []),
        ({"a": {"b": 1}, "c": "x"}, {"a": {"b": 2}, "c": "y"}, ["a.b was 1, is now 2", 'c was "x", is now "y"']),
        ({"old": None}, {"new": {}}, ["new was absent, is now {}", "old was null, is now absent"]),
        ({"a": {"b": 1}}, {"a": 1}, ["a was absent, is now 1", "a.b was 1, is now absent"]),
        ({"a": 1}, {"a": True}, ["a was 1, is now true"]),
        ({"a": 0.1}, {"a": 0.30000000000000004}, ["a was 0.1, is now 0.30000000000000004"]),
        ({"a": "two\nlines"}, {"a": "ü"}, ['a was "two\\nlines", is now "ü"']),
    ],
)
def test_differences(then: dict[str, Any], now: dict[str, Any], expected: list[str]) -> None:
    assert differences(then, now) == expected


def test_long_values_are_cut_to_where_they_differ() -> None:
    text = "x" * 100
    [phrase] = differences({"key": f"{text}1{text}"}, {"key": f"{text}2"})
    assert phrase == f'key was ...{"x" * 8}1{"x" * 33}..., is now ...{"x" * 8}2"'
    [phrase] = differences({"key": "a" + text}, {"key": "b" + text})
    assert phrase == f'key was "a{"x" * 43}..., is now "b{"x" * 43}...'
    [phrase] = differences({"key": [1, 2]}, {"key": [1, 2, *range(100)]})
    assert len(phrase) < 100 and phrase.startswith("key was [1, 2], is now [1, 2, 0, 1,")


def test_plain() -> None:
    assert plain({"a": (1, 2), 3: {"b": None}}) == {"a": [1, 2], "3": {"b": None}}
    for value in ({"a": {1}}, {"a": object()}, {"a": Path()}):
        with pytest.raises(OutputError, match=r"no JSON value: .*calling program"):
            plain(value)
