"""A folder that appears whole or not at all, whenever the program dies.

    out/.awq-partial/lock            held (flock) while a run works here; the system drops it when the process dies
    out/.awq-partial/stage/...       files as they are written
    out/.awq-partial/moving.json     written when the stage is complete: the names about to appear in out/
    out/...                          filled by renames at the very end, config.json last

Nothing loads as a model without config.json, so its rename is the moment the result exists. A killed run leaves
only the partial folder (and, if it died amid the renames, files that moving.json names); the next run into the same
folder clears both away.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from awq_core.errors import OutputError

PARTIAL = ".awq-partial"
COMMIT = "config.json"
CALLER = "this is an error in the calling program"
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class PartialFolder:
    """The staging area of one run. `open` it, fill `stage`, `publish`, and `close` it in any case.

    Attributes:
        stage: where files are written; the same file system as `out`, so that renames are atomic.
        published: whether the result is in `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / PARTIAL
        self.stage = self.folder / "stage"
        self.published = False
        self._created = False
        self._moved: list[Path] = []
        self._lock: int | None = None

    def open(self) -> None:
        """Take the lock and clear what a killed run left.

        Raises:
            OutputError: `out` holds something else, is no folder or not writable, or another run is at work in it.
        """
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is not a folder", hint="choose another --out")
        # A folder with content and no trace of an earlier run is refused before anything in it is touched.
        if self.out.is_dir() and not _is_folder(self.folder):
            self._refuse_content()
        self._created = not self.out.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._clear_stale()
            self._refuse_content()
            self.stage.mkdir()
        except BaseException:
            self.close()
            raise

    @property
    def mode(self) -> int:
        """Permissions of an ordinary new file, for files of libraries that make theirs private."""
        return os.stat(self.folder / "lock").st_mode & 0o777

    def publish(self) -> None:
        """Move everything staged into `out`. In every state between, `out` is no model or the whole of it."""
        names = sorted((path.name for path in self.stage.iterdir()), key=lambda name: (name == COMMIT, name))
        manifest = self.folder / "moving.json"
        manifest.write_text(json.dumps(names), encoding="utf-8")
        sync(manifest)
        for folder in (self.stage, self.folder):
            _sync_folder(folder)
        for name in names:
            target = self.out / name
            if os.path.lexists(target):
                raise OutputError(f"{target} appeared while this run was at work", hint="choose another --out")
            if name == COMMIT:
                _sync_folder(self.out)  # the weights must be safe before the file that announces them
            self._moved.append(target)
            os.replace(self.stage / name, target)
        self.published = True
        _sync_folder(self.out)
        _sync_folder(self.out.absolute().parent)

    def close(self) -> None:
        """Remove the staging area and, unless published, every trace of this run. Never raises."""
        if self._lock is not None:
            if not self.published:
                for path in reversed(self._moved):
                    _remove(path)
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None
        if self._created and not self.published:
            with suppress(OSError):  # not empty: another run has moved in
                self.out.rmdir()

    def _acquire(self) -> None:
        path = self.folder / "lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended between our opening the file and our locking it has removed the file.
            ours = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            ours = False
        except BaseException:
            os.close(descriptor)
            raise
        if not ours:
            os.close(descriptor)
            raise OutputError(f"another run is writing to {self.out}", hint="wait for it, or choose another --out")
        self._lock = descriptor

    def _clear_stale(self) -> None:
        """Remove the stage of a killed run, and what it had moved if it died before moving config.json."""
        manifest = self.folder / "moving.json"
        try:
            moving = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else []
        except ValueError:
            moving = []  # it died writing this: nothing was moved
        if os.path.lexists(self.stage / COMMIT):
            for name in moving:
                # What is still staged was never moved: a file of that name in `out` is somebody's.
                if Path(name).name == name and not os.path.lexists(self.stage / name):
                    _remove(self.out / name)
        shutil.rmtree(self.stage, ignore_errors=True)
        manifest.unlink(missing_ok=True)

    def _refuse_content(self) -> None:
        content = sorted(path.name for path in self.out.iterdir() if path != self.folder or not _is_folder(path))
        if content:
            raise OutputError(f"{self.out} is not empty: it holds {content[0]}", hint="choose another --out")


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the system and safetensors say of the disk into an OutputError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors wraps the system's error in a text that ends in "(os error 28)".
        found = re.search(r"\(os error (\d+)\)", str(error))
        code = int(found[1]) if found else getattr(error, "errno", None)
        if code in _FULL:
            free = f"{_free(out) / 2**20:.0f} MiB free"
            raise OutputError(
                f"disk full writing to {out}: {free}", hint="free space or choose another --out"
            ) from error
        if code in _FORBIDDEN:
            raise OutputError(f"no permission to write to {out}", hint="choose another --out") from error
        text = " ".join(str(error).split())
        raise OutputError(f"cannot write to {out}: {text}", hint="choose another --out") from error


def sync(path: Path) -> None:
    """Have the file's bytes on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some network file systems cannot; the renames are done all the same
        sync(path)


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
