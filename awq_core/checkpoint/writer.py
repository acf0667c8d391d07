"""Writing a model folder: tensors into safetensors shards, an index, and the small files, published all at once.

Tensors go to part files as they arrive, so that little is held in memory. Parts belong to units, the steps of work
the caller commits; a committed unit outlives the run, and the next one goes on after it. At the end neighbouring
parts are joined into shards, in an order that depends on the calls alone: however often a run was killed, the bytes
are those of one that was not. `partial.py` has the protocol that makes the folder appear whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from awq_core.checkpoint.disk import remove, sync, sync_folder
from awq_core.checkpoint.finishing import COMMIT
from awq_core.checkpoint.journal import CALLER, Journal, Part, Unit, plain
from awq_core.checkpoint.partial import PARTIAL, PartialFolder
from awq_core.checkpoint.parts import PartWriter, grouped
from awq_core.checkpoint.shards import INDEX, SINGLE
from awq_core.errors import OutputError

_NAMED = 4  # settings a message names


class CheckpointWriter:
    """Collects tensors into shards and publishes them with the other files. A context manager:

        with CheckpointWriter(out) as writer:
            writer.begin({"bits": 4})
            if writer.complete:
                return
            for key in steps:
                if key not in writer.finished:
                    writer.add("model.norm.weight", tensor)
                    writer.commit(key, {"loss": 0.25})
            writer.finish({"config.json": text})

    `begin` and `commit` make the run resumable. Leaving the block by an exception, or by death, keeps what was
    committed, and nothing else; if that is nothing, also `out` itself is removed if it was made here. Leaving it
    without `finish` does the same and is an error. The same calls give the same bytes.

    Args:
        out: folder to fill; must not exist, or be empty but for what an unfinished run left.
        shard_bytes: parts and shards grow no larger than this, so about this much is held in memory; a larger tensor
            has a shard of its own.
        restart: clear an unfinished run instead of going on with it.

    Raises:
        OutputError: on entering the block, `out` is not empty, not writable or in use by another run; in every
            method, the disk is full or fails, or the calls come in a wrong order.
    """

    def __init__(self, out: str | os.PathLike[str], *, shard_bytes: int = 512 << 20, restart: bool = False) -> None:
        self.out = Path(out)
        self.shard_bytes = shard_bytes
        self._restart = restart
        self._partial = PartialFolder(self.out)
        self._parts = PartWriter(self._partial, shard_bytes)
        self._begun = False
        self._journal: Journal | None = None

    def __enter__(self) -> CheckpointWriter:
        with self._partial.errors():
            self._partial.open(restart=self._restart)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.drop()
        self._partial.close()
        if kind is None and not self._partial.published:
            left = "what was committed is kept" if self.resumable else "it is removed"
            raise OutputError(f"{self.out} was not finished: {left}", hint=CALLER)

    @property
    def complete(self) -> bool:
        """Whether the result is in `out`. True after `begin` if only the last steps were left, which it then took."""
        return self._partial.published

    @property
    def resumable(self) -> bool:
        """Whether `out` holds finished work that a later run with the same identity goes on with."""
        return self._partial.resumable and not self._partial.published

    @property
    def unfinished(self) -> Mapping[str, Any] | None:
        """Before `begin`, the identity of the unfinished run found in `out`, if there is one: for a setting that was
        computed, and is to be taken over rather than computed again."""
        return None if self._begun or self._partial.journal is None else self._partial.journal.identity

    @property
    def total_bytes(self) -> int:
        """Size of the tensors added so far, those of the units found by `begin` included."""
        return self._parts.total_bytes

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """Key -> payload of each committed unit, in order, as JSON gives it back."""
        return {unit.key: unit.payload for unit in self._units()}

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Make this run resumable, and go on with the unfinished one in `out` if it has the same identity.

        Args:
            identity: every setting the result depends on, as JSON values, nested as you like.

        Returns:
            True if an unfinished run was taken up: skip the units in `finished`, or everything if `complete`.

        Raises:
            OutputError: the unfinished run has another identity (named, setting by setting), or tensors have been
                added already.
        """
        if self._begun or self._parts.names:
            raise OutputError("begin() comes once, and first", hint=CALLER)
        settings = {**plain(identity), "writer": {"format": 1, "shard_bytes": self.shard_bytes}}
        self._begun = True
        with self._partial.errors():
            found = self._partial.begin(settings)
        self._journal = self._partial.journal
        self._parts.go_on(self._committed())
        return found

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor, in the dtype to be stored; views and tensors of other devices are copied.

        It is written some time later: do not change it in place after this call.

        Raises:
            OutputError: the name was added before, or the disk cannot take the part.
        """
        self._make_ready()
        self._parts.add(name, tensor)

    def commit(self, key: str, payload: Mapping[str, Any]) -> None:
        """Make one unit of everything added since the last commit; when this returns, it is safe on the disk.

        Args:
            key: names the unit in `finished` and `stored`.
            payload: JSON values to get back in `finished`, floats exactly.

        Raises:
            OutputError: the key was committed before, `begin` was not called, or the disk cannot take the unit.
        """
        if self._journal is None:
            raise OutputError("commit() needs begin()", hint=CALLER)
        self._make_ready()
        if any(unit.key == key for unit in self._units()):
            raise OutputError(f"unit {key} was committed twice", hint=CALLER)
        result = plain(payload)
        self._parts.flush()
        with self._partial.errors():
            sync_folder(self._partial.parts)
            self._journal.append(Unit(key, result, tuple(self._parts.open)))
        self._parts.open = []

    def stored(self, key: str) -> dict[str, torch.Tensor]:
        """Read the tensors of a committed unit back, each into memory of its own.

        Raises:
            OutputError: no such unit, or the run is finished.
        """
        self._make_ready()
        unit = next((unit for unit in self._units() if unit.key == key), None)
        if unit is None:
            raise OutputError(f"unit {key} was not committed", hint=CALLER)
        tensors: dict[str, torch.Tensor] = {}
        with self._partial.errors():
            for part in unit.parts:
                with safe_open(self._partial.parts / part.file, framework="pt") as file:
                    tensors.update({name: file.get_tensor(name).clone() for name in part.names})
        return tensors

    def finish(self, files: Mapping[str, bytes | str | Path]) -> None:
        """Join the parts into shards, write the index of several and `files`, and make all of it appear, config.json
        last. A resumable run that dies in here is finished by the next `begin`.

        Args:
            files: name in `out` ("a/b" makes a subfolder) -> content, or the file to copy it from. config.json is
                required: until it is there, the folder is no model.

        Raises:
            OutputError: no tensor was added, a name is taken or leads outside, or the disk cannot take it.
        """
        self._make_ready()
        if COMMIT not in files:
            raise OutputError(f"a checkpoint needs a {COMMIT}", hint=CALLER)
        self._parts.flush()
        groups = grouped([*self._committed(), *self._parts.open], self.shard_bytes)
        if not groups:
            raise OutputError("a checkpoint needs tensors, and none was added", hint=CALLER)
        count = len(groups)
        names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        shards = dict(zip(names, groups, strict=True))
        with self._partial.errors():
            remove(self._partial.stage)  # an attempt before this one may have failed
            self._partial.stage.mkdir()
            if count > 1:
                self._write(INDEX, self._index(shards), shards)
            for name, content in files.items():
                self._write(name, content, shards)
            self._partial.publish({name: tuple(part.file for part in parts) for name, parts in shards.items()})

    def _units(self) -> list[Unit]:
        return self._journal.units if self._journal is not None else []

    def _committed(self) -> list[Part]:
        return [part for unit in self._units() for part in unit.parts]

    def _index(self, shards: Mapping[str, tuple[Part, ...]]) -> str:
        weight_map = {name: shard for shard, parts in shards.items() for part in parts for name in part.names}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"

    def _write(self, name: str, content: bytes | str | Path, taken: Iterable[str]) -> None:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] in ("/", PARTIAL) or ".." in parts:
            raise OutputError(f"{name!r} is no name of a file inside {self.out}", hint=CALLER)
        path = self._partial.stage.joinpath(*parts)
        if path.exists() or parts[0] in taken:
            raise OutputError(f"{name} is written twice", hint=CALLER)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            shutil.copyfile(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(path)
        sync_folder(path.parent)

    def _make_ready(self) -> None:
        if self._partial.published:
            raise OutputError(f"{self.out} is finished already", hint=CALLER)
        if self._begun and self._journal is None:
            raise OutputError("begin() failed before", hint=CALLER)
        if not self._begun and self._partial.journal is not None:
            with self._partial.errors():
                self._partial.start_over()  # a caller that does not begin cannot resume
        if self._partial.finishing is not None:
            raise OutputError(f"finishing {self.out} failed before", hint="run the same command again")
