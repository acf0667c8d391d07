"""The last steps of a run, written down before the first of them, so that whoever finds them can go on.

    shards   parts/00001.safetensors + parts/00002.safetensors -> stage/model-00001-of-00007.safetensors
    moves    stage/* -> out/*, config.json last

Shards are complete in the stage before any of their parts is removed, and nothing appears in `out` before all are.
Every step is a rename, or ends in one: a source that is gone means that its step is done, so `roll_forward` may be
killed and repeated at will. The extra room it takes is one shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from awq_core.checkpoint.assemble import concatenate
from awq_core.checkpoint.disk import remove, sync, sync_folder, write_whole
from awq_core.errors import OutputError

COMMIT = "config.json"
FINISHING = "finishing.json"
PARTS = "parts"
STAGE = "stage"


@dataclass(frozen=True, slots=True)
class Finishing:
    """What is about to appear in `out`.

    Attributes:
        out: the folder to fill.
        folder: the partial folder in it.
        shards: shard -> the files in `parts` it is made of.
        moves: every name about to appear, in order.
    """

    out: Path
    folder: Path
    shards: Mapping[str, tuple[str, ...]]
    moves: tuple[str, ...]

    @classmethod
    def plan(cls, out: Path, folder: Path, shards: Mapping[str, tuple[str, ...]]) -> Finishing:
        """The steps that publish all that is staged, and the shards; on the disk when this returns.

        Raises:
            OSError: the disk cannot take it.
        """
        names = {path.name for path in (folder / STAGE).iterdir()} | set(shards)
        moves = tuple(sorted(names, key=lambda name: (name == COMMIT, name)))
        sync_folder(folder / STAGE)
        write_whole(folder / FINISHING, json.dumps({"shards": shards, "moves": moves}).encode())
        return cls(out, folder, shards, moves)

    @classmethod
    def load(cls, out: Path, folder: Path) -> Finishing | None:
        """The steps an earlier run wrote down; None if it did not come to that."""
        try:
            found = json.loads((folder / FINISHING).read_bytes())
            shards = {name: tuple(parts) for name, parts in found["shards"].items()}
            moves = tuple(found["moves"])
            names = [*moves, *(part for parts in shards.values() for part in parts)]
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None  # it is written whole, so a broken one is no work of ours
        plain = all(isinstance(name, str) and name == Path(name).name for name in names)
        return cls(out, folder, shards, moves) if plain else None

    @property
    def arrived(self) -> bool:
        """Whether config.json is in its place, and with it all the rest."""
        return self.moved(COMMIT)

    def moved(self, name: str) -> bool:
        """Whether the file of this name in `out` is ours."""
        sources = [self.folder / STAGE / name, *self._parts(name)]
        return name in self.moves and not any(os.path.lexists(source) for source in sources)

    def roll_forward(self) -> None:
        """Take the steps that are left. In every state between, `out` is no model or the whole of it.

        Raises:
            OutputError: a file of that name appeared in `out` meanwhile, or one of ours has been removed.
            CheckpointError: a part is corrupt.
            OSError: the disk is full or fails.
        """
        for name in self.shards:
            self._assemble(name)
        for folder in (self.folder / STAGE, self.folder):
            sync_folder(folder)
        for name in self.moves:
            source, target = self.folder / STAGE / name, self.out / name
            if self.moved(name):
                if not os.path.lexists(target):
                    raise _damaged(self.out, target)
                continue
            if os.path.lexists(target):
                raise OutputError(f"{target} appeared while this run was at work", hint="choose another --out")
            if name == COMMIT:
                sync_folder(self.out)  # the weights must be safe before the file that announces them
            os.replace(source, target)
        sync_folder(self.out)
        sync_folder(self.out.absolute().parent)

    def _parts(self, shard: str) -> list[Path]:
        return [self.folder / PARTS / part for part in self.shards.get(shard, ())]

    def _assemble(self, shard: str) -> None:
        parts, target = self._parts(shard), self.folder / STAGE / shard
        if self.moved(shard):
            return
        if not os.path.lexists(target):
            if missing := [part for part in parts if not part.exists()]:
                raise _damaged(self.out, missing[0])
            if len(parts) == 1:
                os.replace(parts[0], target)
                return
            temporary = self.folder / "shard.tmp"
            try:
                concatenate(parts, temporary)
                sync(temporary)
                os.replace(temporary, target)
            except BaseException:
                remove(temporary)  # on a full disk, its room is what the user needs
                raise
            sync_folder(target.parent)
        for part in parts:
            part.unlink(missing_ok=True)


def _damaged(out: Path, missing: Path) -> OutputError:
    return OutputError(f"the unfinished run in {out} is damaged: {missing} is gone", hint="begin again with --restart")
