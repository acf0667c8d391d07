"""What commands print: data on stdout, everything meant for the eye while waiting on stderr.

Nothing here imports torch or rich; the console is made when a table or a progress bar is drawn.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

# What a context remembers: the command has printed its one document; it was asked for JSON.
DOCUMENT = "awq.document"
JSON = "awq.json"


def print_json(value: Any) -> None:
    """The command's one JSON document. After it, an error is told on stderr and by the exit code only."""
    click.echo(json.dumps(plain(value), indent=2, ensure_ascii=False))
    context = click.get_current_context(silent=True)
    if context is not None:
        context.meta[DOCUMENT] = True


def print_json_line(value: Any) -> None:
    """One line of a stream of JSON objects."""
    click.echo(json.dumps(plain(value), ensure_ascii=False))


def plain(value: Any) -> Any:
    """A value JSON can hold: paths as text, and NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def note(text: str = "") -> None:
    """A line for the eye, on stderr."""
    click.echo(text, err=True)


def one_line(text: str) -> str:
    """`text` without line breaks."""
    return " ".join(text.split())


def duration(seconds: float) -> str:
    """Seconds for people: "8 ms", "0.8 s", "42 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 0.095:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def command_line(*words: str | Path) -> str:
    """A command to copy into a shell."""
    return shlex.join(map(str, words))


def plural(count: int, word: str) -> str:
    """ "1 block", "6 blocks"."""
    return f"{count} {word}{'' if count == 1 else 's'}"


def weight_bytes(folder: Path) -> int:
    """Size on disk of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
