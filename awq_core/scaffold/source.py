"""Values as Python source, laid out as `ruff format` does it: on one line where it fits, else one item a line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from awq_core.hooks import ScaleGroup

WIDTH = 120
STEP = 4


@dataclass(frozen=True, slots=True)
class Raw:
    """Source that stands as it is; `comment` goes beside it, or above where the line is too long."""

    text: str
    comment: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """name(key=value, ...)."""

    name: str
    arguments: tuple[tuple[str, Any], ...]


def source(value: Any, *, column: int = 0, indent: int = 0, after: int = 0) -> str:
    """Source of a value.

    Args:
        value: numbers, strings, None, `Raw`, `Call`, `ScaleGroup`, and sequences and mappings of them.
        column: where its first line begins, in characters; `indent`: of the line that it begins on.
        after: characters that follow on its last line.
    """
    value = _call(value) if isinstance(value, ScaleGroup) else value
    if isinstance(value, Raw):
        return value.text
    parts = _parts(value)
    if parts is None:
        return _quoted(value) if isinstance(value, str) else repr(value)
    opening, items, closing = parts
    commented = any(isinstance(item, Raw) and item.comment for _, item in items)
    alone = "," if closing == ")" and opening == "(" and len(items) == 1 else ""
    flat = opening + ", ".join(key + source(item) for key, item in items) + alone + closing
    if not commented and "\n" not in flat and column + len(flat) + after <= WIDTH:
        return flat
    inner = indent + STEP
    lines = [opening]
    for key, item in items:
        text = key + source(item, column=inner + len(key), indent=inner, after=1) + ","
        lines += [
            " " * inner + line if number == 0 else line for number, line in enumerate(_with_comment(text, item, inner))
        ]
    return "\n".join([*lines, " " * indent + closing])


def _with_comment(text: str, item: Any, inner: int) -> Iterator[str]:
    comment = item.comment if isinstance(item, Raw) else ""
    if comment and inner + len(text) + len(comment) + 4 > WIDTH:
        above = textwrap.wrap(comment, WIDTH - inner - 2)
        yield f"# {above[0]}"
        yield from (" " * inner + f"# {line}" for line in above[1:])
        yield " " * inner + text
    else:
        yield f"{text}  # {comment}" if comment else text


def _parts(value: Any) -> tuple[str, list[tuple[str, Any]], str] | None:
    """Opening, (what goes before, item), closing; None where a value has no items."""
    if isinstance(value, Call):
        return f"{value.name}(", [(f"{key}=", item) for key, item in value.arguments], ")"
    if isinstance(value, Mapping):
        return "{", [(f"{_quoted(str(key))}: ", item) for key, item in value.items()], "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        return opening, [("", item) for item in value], closing
    return None


def _call(group: ScaleGroup) -> Call:
    """A group with the fields that are not the default."""
    given = [(one.name, getattr(group, one.name)) for one in fields(group) if getattr(group, one.name) != one.default]
    return Call("ScaleGroup", tuple(given))


def _quoted(text: str) -> str:
    plain = repr(text)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain else plain
