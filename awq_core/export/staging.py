"""A folder of files that other libraries write: each is written aside, and all of them appear at once or not at all."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from awq_core.checkpoint.disk import sync
from awq_core.checkpoint.partial import PartialFolder
from awq_core.errors import ConfigError
from awq_core.export.writing import unfinished


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write to, whose files appear in `out` when the block ends well. One of them is config.json.

    Raises:
        OutputError: `out` is not empty, holds an unfinished run, or the disk cannot take it.
    """
    partial = PartialFolder(out)
    with partial.errors():
        partial.open()
        try:
            if partial.journal is not None:
                raise unfinished(out)
            yield partial.stage
            for path in partial.stage.iterdir():
                sync(path)
            partial.publish({})
        finally:
            partial.close()


def put(stage: Path, files: Mapping[str, bytes | str | Path]) -> None:
    """Write small files, by name, or copy them from where they are."""
    for name, content in files.items():
        if isinstance(content, Path):
            shutil.copyfile(content, stage / name)
        else:
            (stage / name).write_bytes(content.encode() if isinstance(content, str) else content)


def require(extra: str, *packages: str) -> None:
    """Refuse to begin without the packages of an extra. Raises ConfigError."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"--to {extra} needs {' and '.join(missing)}", hint=f'pip install "awq-core[{extra}]"')
