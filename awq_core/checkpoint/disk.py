"""What this package needs of a file system: bytes that are really on the disk, and errors that say what to do.

A rename is atomic, so a file written beside its place and renamed into it is there whole or not at all, whenever
the program dies. That it also survives a power cut takes an fsync of the file before and of the folder after.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from awq_core.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors(out: Path, kept: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn what the system and safetensors say of the disk into an OutputError that names the folder.

    Args:
        out: the folder being written.
        kept: whether the work done so far outlives the error, so that the hint can say how to go on.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in a text that ends in "(os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = int(found[1]) if found else getattr(error, "errno", None)
        again = "run the same command again: it resumes where it stopped" if kept() else ""
        if code in _FULL:
            free = f"{_free(out) / 2**20:.0f} MiB free"
            raise OutputError(
                f"disk full writing to {out}: {free}",
                hint=f"free space and {again}" if again else "free space or choose another --out",
            ) from error
        hint = again or "choose another --out"
        if code in _FORBIDDEN:
            raise OutputError(f"no permission to write to {out}", hint=hint) from error
        text = " ".join(str(error).split())
        raise OutputError(f"cannot write to {out}: {text}", hint=hint) from error


def sync(path: Path) -> None:
    """Have the file's bytes on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Have the folder's list of names on the disk before going on."""
    with suppress(OSError):  # some network file systems cannot; the renames are done all the same
        sync(path)


def write_whole(path: Path, content: bytes) -> None:
    """Make the file appear with all of its content, or leave what was there; safe on the disk on return."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    sync(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def is_folder(path: Path) -> bool:
    """A real folder: what a link points to is not ours to clear."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as the system lets us. Never raises."""
    if is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free
