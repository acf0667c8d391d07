"""What the system says of the disk, as an error that names the folder and says what to do."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from awq_core.checkpoint import parts
from awq_core.checkpoint.disk import disk_errors, write_whole
from awq_core.checkpoint.partial import PARTIAL
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import OutputError


def write(out: Path) -> None:
    with CheckpointWriter(out, shard_bytes=3 * 256) as target:
        for i in range(10):
            target.add(f"layers.{i}.weight", torch.full((64,), float(i)))
        target.finish({"config.json": "{}", "merges.txt": b"a b\n"})


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_while_writing_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(parts, "save_file", full)
    with pytest.raises(OutputError, match=r"disk full writing to .*/out: \d+ MiB free \(free space or"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("owner", "victim"), [(os, "fsync"), (Path, "mkdir"), (Path, "write_bytes")])
def test_a_full_disk_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, victim: str) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, victim, full)
    with pytest.raises(OutputError, match="disk full"):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_system_refuses_inside_safetensors(tmp_path: Path) -> None:
    # A real error from the system, through the library: files may not grow beyond 1000 bytes.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot write to .*File too large"):
            write(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    # Simulated: tests may run as root, whom permissions do not stop.
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(OutputError, match=r"no permission to write to .*out"):
        write(tmp_path / "out")


@pytest.mark.parametrize(
    ("code", "kept", "text"),
    [
        (errno.ENOSPC, False, r"disk full writing to .*: \d+ MiB free \(free space or choose another --out\)"),
        (
            errno.ENOSPC,
            True,
            r"disk full .* \(free space and run the same command again: it resumes where it",
        ),
        (errno.EIO, False, r"cannot write to .*: .*Input/output error.* \(choose another --out\)"),
        (errno.EIO, True, r"cannot write to .* \(run the same command again: it resumes where it stopped\)"),
        (errno.EACCES, True, r"no permission .* \(run the same command again: it resumes where it stopped\)"),
    ],
)
def test_hints(tmp_path: Path, code: int, kept: bool, text: str) -> None:
    with pytest.raises(OutputError, match=text), disk_errors(tmp_path / "not" / "made", lambda: kept):
        raise OSError(code, os.strerror(code))


def test_a_file_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"first")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first"


def test_a_part_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(tensors: Any, path: Path, **kwargs: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parts, "save_file", torn)
    with CheckpointWriter(tmp_path / "out") as target:
        target.add("a", torch.ones(1))
        with pytest.raises(OutputError, match="disk full"):
            target.finish({"config.json": "{}"})
        assert not list((tmp_path / "out" / PARTIAL / "parts").glob("*.safetensors"))
        monkeypatch.undo()
        target.finish({"config.json": "{}"})
