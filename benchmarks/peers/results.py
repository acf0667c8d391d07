"""The file of an accuracy benchmark: a line of JSON for each model, group size, run and text.

    {"model", "weights", "calibration", "windows", "group_size", "run", "text",       what was measured: `Key`
     "settings", "version", "total", "cpu", "peak_gb", "bytes",                       how; seconds, size on disk
     "nll": [a number a window], "kl": [..], "agreement": [..]}                        or "failed": why

Lines are only added; of two with the same key the later one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ORIGINAL = "original"


@dataclass(frozen=True)
class Key:
    """What a line is about.

    Attributes:
        model: the folder's name.
        weights: fingerprint of what is in it: a model trained further is another model.
        calibration: windows, their length and the text they are of.
        windows: asked for, to measure on.
        group_size: 0 for the original.
        run: `Run.name`, or "original".
        text: what --text calls it.
    """

    model: str
    weights: str
    calibration: str
    windows: int
    group_size: int = 0
    run: str = ORIGINAL
    text: str = ""

    @classmethod
    def of(cls, record: Record) -> Key:
        return cls(**{field.name: record[field.name] for field in fields(cls)})

    def of_run(self, run: str, group_size: int, text: str) -> Key:
        return replace(self, run=run, group_size=group_size, text=text)


def read(path: Path) -> dict[Key, Record]:
    """The latest line of each key; empty if there is no file. A last line cut short by a kill is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    found = {}
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{path}: line {number + 1} is not JSON") from None
        found[Key.of(record)] = record
    return found


def append(path: Path, key: Key, values: Record) -> None:
    """One line more, on a line of its own even after one cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 1, 0))
        if size and file.read() != b"\n":
            file.truncate(_last_line_start(path))
        file.write((json.dumps(asdict(key) | values) + "\n").encode())


def _last_line_start(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def missing(done: dict[Key, Record], wanted: Sequence[Key], again: Iterable[str] = ()) -> list[Key]:
    """What is still to be measured.

    Args:
        again: runs to measure although they are there; "failed" stands for those that failed.
    """
    names = set(again)

    def settled(key: Key) -> bool:
        record = done.get(key)
        return record is not None and key.run not in names and not ("failed" in names and "failed" in record)

    return [key for key in wanted if not settled(key)]
