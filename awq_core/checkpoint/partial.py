"""A folder that appears whole or not at all, whenever the program dies, and in which no finished work is lost.

    out/.awq-partial/lock            held (flock) while a run works here; the system drops it when the process dies
    out/.awq-partial/parts/...       tensors as they are written
    out/.awq-partial/journal.jsonl   which of them are finished work, and of what run (journal.py)
    out/.awq-partial/stage/...       the files to appear
    out/.awq-partial/finishing.json  written when all is ready: the steps left (finishing.py)
    out/...                          filled by renames at the very end, config.json last

Nothing loads as a model without config.json, so its rename is the moment the result exists. A killed run leaves
the partial folder (and, if it died amid the renames, files that finishing.json names). With a journal the next run
goes on from there; without one it clears both away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from awq_core.checkpoint.disk import disk_errors, is_folder, remove
from awq_core.checkpoint.finishing import FINISHING, PARTS, STAGE, Finishing
from awq_core.checkpoint.journal import Journal, Part, differences
from awq_core.errors import OutputError

PARTIAL = ".awq-partial"
JOURNAL = "journal.jsonl"
_LOCK = "lock"
_NAMED = 4  # settings a message names


class PartialFolder:
    """The working area of one run. `open` it, fill `parts` and `stage`, `publish`, and `close` it in any case.

    Attributes:
        stage, parts: where files are written; the same file system as `out`, so that renames are atomic.
        journal: of the run at work here, or of the unfinished one found here; None for a run that cannot resume.
        finishing: the last steps, once they are written down.
        published: whether the result is in `out`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / PARTIAL
        self.stage = self.folder / STAGE
        self.parts = self.folder / PARTS
        self.journal: Journal | None = None
        self.finishing: Finishing | None = None
        self.published = False
        self._created = False
        self._known = False  # whether what an earlier run left has been looked at
        self._lock: int | None = None

    def open(self, *, restart: bool = False) -> None:
        """Take the lock, find an unfinished run, and clear what cannot be resumed, or with `restart` all of it.

        Raises:
            OutputError: `out` holds something else, is no folder or not writable, or another run is at work in it.
        """
        if self.out.exists() and not self.out.is_dir():
            raise OutputError(f"{self.out} is not a folder", hint="choose another --out")
        # A folder with content and no trace of an earlier run is refused before anything in it is touched.
        if self.out.is_dir() and not is_folder(self.folder):
            self._refuse_content()
        self._created = not self.out.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.journal = Journal.load(self.folder / JOURNAL)
            self.finishing = Finishing.load(self.out, self.folder)
            self._known = True
            self._refuse_content()
            if restart or self.journal is None:
                self.start_over()
        except BaseException:
            self.close()
            raise

    @property
    def resumable(self) -> bool:
        """Whether there is finished work here that a later run can use."""
        return self.journal is not None and bool(self.journal.units or self.finishing)

    @property
    def mode(self) -> int:
        """Permissions of an ordinary new file, for files of libraries that make theirs private."""
        return os.stat(self.folder / _LOCK).st_mode & 0o777

    def errors(self) -> AbstractContextManager[None]:
        """`disk_errors` for this folder."""
        return disk_errors(self.out, lambda: self.resumable)

    def begin(self, identity: dict[str, Any]) -> bool:
        """Open the journal of a run with this identity: that of the unfinished run found here, or a new one.

        Returns:
            True for the one found here. Its last steps have then been taken, if it had come to them.

        Raises:
            OutputError: the unfinished run has another identity, and finished work that would be lost.
        """
        changes = differences(self.journal.identity, identity) if self.journal is not None else []
        if self.journal is not None and not changes:
            self._go_on(self.journal)
            return True
        if changes and self.resumable and not (self.finishing is not None and self.finishing.arrived):
            more = f"; and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
            raise OutputError(
                f"{self.out} holds an unfinished run with other settings: {'; '.join(changes[:_NAMED])}{more}",
                hint="give the same arguments to go on with it, --restart to begin again, or another --out",
            )
        if self.journal is not None:
            self.start_over()
        self.journal = Journal.create(self.folder / JOURNAL, identity)
        return False

    def start_over(self) -> None:
        """Clear the unfinished run, if there is one, and make the working area anew.

        Raises:
            OutputError: the run found here was not unfinished after all: its result is in `out`.
        """
        self._clear()
        self._refuse_content()
        for area in (self.stage, self.parts):
            area.mkdir()

    def publish(self, shards: Mapping[str, tuple[str, ...]]) -> None:
        """Make everything staged appear in `out`, and the shards, which are made of the parts named."""
        self.finishing = Finishing.plan(self.out, self.folder, shards)
        self.finishing.roll_forward()
        self.published = True

    def close(self) -> None:
        """Drop the lock and, unless the run can be resumed, every trace of it but the result. Never raises."""
        if self._lock is not None:
            with suppress(OSError):
                if self._known and (self.published or not self.resumable):
                    self._clear()
                    shutil.rmtree(self.folder, ignore_errors=True)
                elif self._known and self.finishing is None:
                    self._tidy()  # the disk may be full
            os.close(self._lock)
            self._lock = None
        if self._created and not self.published:
            for folder in (self.folder, self.out):
                with suppress(OSError):  # not empty: the run can be resumed, or another has moved in
                    folder.rmdir()

    def _acquire(self) -> None:
        path = self.folder / _LOCK
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

    def _go_on(self, journal: Journal) -> None:
        """Take up the unfinished run: its last steps if it came to them, else the units that are still sound."""
        if self.finishing is not None:
            self.finishing.roll_forward()
            self.published = True
            return
        units = journal.units
        damaged = (i for i, unit in enumerate(units) if not all(map(self._is_sound, unit.parts)))
        if (sound := next(damaged, len(units))) < len(units):
            journal.keep(sound)
        self._tidy()
        self.stage.mkdir()
        self.parts.mkdir(exist_ok=True)

    def _clear(self) -> None:
        """Remove an unfinished run, with what it had moved if it died before moving config.json."""
        areas = (self.stage, self.parts)
        if self.published:
            # The journal is the last to go: killed before that, the next run still knows this one as complete.
            for area in areas:
                remove(area)
        # Otherwise the first: killed after that, the next run clears what is left, in the same order.
        (self.folder / JOURNAL).unlink(missing_ok=True)
        if self.finishing is not None and not self.finishing.arrived:
            for name in filter(self.finishing.moved, self.finishing.moves):
                remove(self.out / name)
        self.journal = self.finishing = None
        self._tidy()
        for area in areas:
            remove(area)

    def _tidy(self) -> None:
        """Remove what is no finished work: parts that no unit has, and files staged too early."""
        (self.folder / FINISHING).unlink(missing_ok=True)  # before what it tells of
        units = self.journal.units if self.journal is not None else []
        finished = {part.file for unit in units for part in unit.parts}
        for path in self.folder.iterdir():
            if path.name not in (_LOCK, JOURNAL, PARTS):
                remove(path)
        for path in self.parts.iterdir() if self.parts.is_dir() else ():
            if path.name not in finished:
                remove(path)

    def _is_sound(self, part: Part) -> bool:
        path = self.parts / part.file
        return path.is_file() and path.stat().st_size == part.size

    def _refuse_content(self) -> None:
        content = sorted(path.name for path in self.out.iterdir() if path != self.folder or not is_folder(path))
        if self.finishing is not None:
            content = [name for name in content if not self.finishing.moved(name)]
        if content:
            raise OutputError(f"{self.out} is not empty: it holds {content[0]}", hint="choose another --out")
