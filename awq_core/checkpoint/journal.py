"""What an unfinished run has done: one line a unit of work, appended when all that it names is safe on the disk.

    {"identity": {...}, "sha256": ...}                                   the settings, before any work
    {"key": "layers.0", "payload": {...}, "parts": [...], "sha256": ...}   one unit: its result, and where it lies

A unit is done if its line is whole, newline and checksum included. Dying while a line is written leaves a torn one:
the journal ends before it, the next append overwrites it, and that unit is done again.

Results of two runs with different settings must not be mixed, so the first line says what the run depends on, and
`differences` names what changed since.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from awq_core.checkpoint.disk import write_whole
from awq_core.errors import OutputError

CALLER = "this is an error in the calling program"

_SEAL = b',"sha256":"'
_LONGEST = 48  # characters of one value in a message


@dataclass(frozen=True, slots=True)
class Part:
    """One safetensors file of a unit.

    Attributes:
        file: its name.
        size: bytes of the file.
        nbytes: bytes of the tensors in it.
        names: the tensors, in the order they were added.
    """

    file: str
    size: int
    nbytes: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A finished unit of work: `payload` is whatever JSON value its maker wants back, floats exactly."""

    key: str
    payload: dict[str, Any]
    parts: tuple[Part, ...]


class Journal:
    """The journal of one run; `create` or `load` makes it.

    Attributes:
        identity: the settings the run was begun with.
        units: what is done, in order.
    """

    def __init__(self, path: Path, identity: dict[str, Any], units: list[Unit], ends: list[int]) -> None:
        self.path, self.identity, self.units = path, identity, units
        self._ends = ends  # where the first line, and each unit's, ends in the file

    @classmethod
    def create(cls, path: Path, identity: dict[str, Any]) -> Journal:
        """Begin a journal on the disk. Raises OSError, as the methods below do."""
        line = _sealed({"identity": identity})
        write_whole(path, line)
        return cls(path, identity, [], [len(line)])

    @classmethod
    def load(cls, path: Path) -> Journal | None:
        """Read a journal up to the first line that is not whole; None if not even the first is."""
        try:
            lines = path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return None
        records: list[dict[str, Any]] = []
        ends: list[int] = []
        for line in lines:
            record = _opened(line)
            if record is None:
                break
            records.append(record)
            ends.append(len(line) + 1 + (ends[-1] if ends else 0))
        return cls(path, records[0]["identity"], [_unit(record) for record in records[1:]], ends) if records else None

    def append(self, unit: Unit) -> None:
        """Make a unit count; it does once this returns. After an error it may be tried again."""
        line = _sealed(asdict(unit))
        self._rewrite(line)
        self.units.append(unit)
        self._ends.append(self._ends[-1] + len(line))

    def keep(self, count: int) -> None:
        """Forget all units but the first `count`."""
        del self.units[count:], self._ends[count + 1 :]
        self._rewrite(b"")

    def _rewrite(self, tail: bytes) -> None:
        """Put `tail` after the last line that counts, over whatever is there."""
        with open(self.path, "r+b") as file:
            file.seek(self._ends[-1])
            file.truncate()
            file.write(tail)
            file.flush()
            os.fsync(file.fileno())


def plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value as JSON gives it back, so that a resumed run sees what this one does.

    Raises:
        OutputError: it holds something that JSON cannot.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(dict(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"no JSON value: {' '.join(str(error).split())}", hint=CALLER) from error
    return result


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that changed, such as "search.grid was 20, is now 10"; nested ones with dots."""
    old, new = _flat(then), _flat(now)
    texts = {name: (old.get(name, "absent"), new.get(name, "absent")) for name in {**new, **old}}
    return [f"{name} was {_short(a, b)}, is now {_short(b, a)}" for name, (a, b) in texts.items() if a != b]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Setting -> its value as text, in which 1, 1.0 and true differ, as they do to a reader."""
    result: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            result.update(_flat(value, f"{prefix}{name}."))
        else:
            result[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
    return result


def _short(text: str, other: str) -> str:
    """The text, cut to the stretch in which it begins to differ from the other."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    if len(text) > _LONGEST and same > _LONGEST // 2:
        text = "..." + text[same - 8 :]
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _sealed(record: dict[str, Any]) -> bytes:
    """The record as a line that ends in its own checksum."""
    body = json.dumps(record, separators=(",", ":")).encode()
    return body[:-1] + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def _opened(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its newline; None if the line is not as it was written."""
    head, _, tail = line.rpartition(_SEAL)
    body = head + b"}"
    return json.loads(body) if tail == hashlib.sha256(body).hexdigest().encode() + b'"}' else None


def _unit(record: dict[str, Any]) -> Unit:
    parts = [Part(part["file"], part["size"], part["nbytes"], tuple(part["names"])) for part in record["parts"]]
    return Unit(record["key"], record["payload"], tuple(parts))
