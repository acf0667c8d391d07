"""Whole or absent, for a run that cannot resume: two runs, full folders, exceptions, and SIGKILL at every moment."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from awq_core.checkpoint import partial
from awq_core.checkpoint.partial import PARTIAL
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import CheckpointError, OutputError

TENSORS = {f"layers.{i}.weight": torch.full((64,), float(i)) for i in range(10)}  # 256 bytes each
SHARD = 3 * 256  # three of them to a shard, so four shards
FILES: dict[str, bytes | str | Path] = {"config.json": "{}", "merges.txt": b"a b\n"}


def write(out: Path) -> None:
    with CheckpointWriter(out, shard_bytes=SHARD) as target:
        for name, tensor in TENSORS.items():
            target.add(name, tensor)
        target.finish(FILES)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_with_content_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"not empty: it holds thesis\.tex.*another --out"):
        write(tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"x"}
    write(tmp_path / "fresh")
    before = content(tmp_path / "fresh")
    with pytest.raises(OutputError, match="not empty"):
        write(tmp_path / "fresh")
    assert content(tmp_path / "fresh") == before


def test_a_file_or_a_link_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        write(tmp_path / "file")
    # A link in the place of the partial folder must not have its target cleared.
    precious = tmp_path / "precious"
    (precious / "stage").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PARTIAL).symlink_to(precious)
    with pytest.raises(OutputError, match="not empty"):
        write(tmp_path / "out")
    assert (precious / "stage").exists()


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out) as first:
        first.add("a", torch.ones(1))
        with pytest.raises(OutputError, match="another run is writing"), CheckpointWriter(out):
            pytest.fail("two runs in one folder")
        first.finish(FILES)
    assert set(content(out)) == {"model.safetensors", "config.json", "merges.txt"}


def test_a_lock_that_was_removed_meanwhile_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock_after_the_other_run_ended(descriptor: int, how: int) -> None:
        (tmp_path / "out" / PARTIAL / "lock").unlink()

    monkeypatch.setattr(partial.fcntl, "flock", flock_after_the_other_run_ended)
    with pytest.raises(OutputError, match="another run"):
        write(tmp_path / "out")


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("made_before", [True, False])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException, made_before: bool) -> None:
    out = tmp_path / "out"
    if made_before:
        out.mkdir()
    with pytest.raises(type(error)), CheckpointWriter(out, shard_bytes=SHARD) as target:
        for name, tensor in TENSORS.items():
            target.add(name, tensor)
        raise error
    assert out.exists() == made_before
    assert not made_before or not any(out.iterdir())


def test_an_exception_after_finish_keeps_the_result(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out") as target:
        target.add("a", torch.ones(1))
        target.finish(FILES)
        raise RuntimeError
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("at", range(7))
def test_a_failing_move_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    out, replace, moves = tmp_path / "out", os.replace, 0

    def failing(source: Path, target: Path) -> None:
        nonlocal moves
        if Path(target).parent == out:
            assert not (out / "config.json").exists(), "config.json is the last"
            moves += 1
            if moves == at + 1:
                raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match=r"cannot write to .*out: .*Input/output error"):
        write(out)
    assert moves == at + 1 and not out.exists()


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="appeared while"), CheckpointWriter(tmp_path) as target:
        target.add("a", torch.ones(1))
        (tmp_path / "merges.txt").write_text("somebody's")
        target.finish(FILES)
    assert content(tmp_path) == {"merges.txt": b"somebody's"}


RUN = """
import os, sys, time
from pathlib import Path
import torch
from awq_core.checkpoint.writer import CheckpointWriter

out, stop_at = Path(sys.argv[1]), int(sys.argv[2])
replace, moves = os.replace, 0

def stop():
    print("ready", flush=True)
    time.sleep(600)

def counting(source, target):
    global moves
    if Path(target).parent == out:
        if moves == stop_at:
            stop()
        moves += 1
    replace(source, target)

os.replace = counting
with CheckpointWriter(out, shard_bytes=768) as writer:
    for i in range(10):
        writer.add(f"layers.{i}.weight", torch.full((64,), float(i)))
        if stop_at == -1 and i == 7:
            stop()
    writer.finish({"config.json": "{}", "merges.txt": b"a b\\n"})
stop()
"""


@pytest.mark.parametrize("stop_at", [-1, 0, 3, 6, 7])
def test_kill_at_any_moment(tmp_path: Path, stop_at: int) -> None:
    """-1: between tensors; 0 to 6: before that rename, of seven; 7: after all of them."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(out), str(stop_at)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            if stop_at < 7:
                with pytest.raises(OutputError, match="another run is writing"):
                    write(out)
        finally:
            process.send_signal(signal.SIGKILL)
    if stop_at == 7:
        write(tmp_path / "other")
        assert content(out) == content(tmp_path / "other")
        return
    left = {path.name for path in out.iterdir()}
    assert PARTIAL in left and "config.json" not in left and len(left) == 1 + max(stop_at, 0)
    if stop_at < 5:  # before the last shard
        with pytest.raises(CheckpointError):
            CheckpointReader(out)
    write(out)  # the next run clears away what is left
    write(tmp_path / "other")
    assert content(out) == content(tmp_path / "other")


def half_moved(out: Path) -> Path:
    """What a run leaves that is killed after moving `a` of `a`, `b` and config.json; returns the stage."""
    stage = out / PARTIAL / "stage"
    stage.mkdir(parents=True)
    (out / "a").write_text("ours")
    for name in ("b", "config.json"):
        (stage / name).write_text("ours")
    (out / PARTIAL / "finishing.json").write_text(json.dumps({"shards": {}, "moves": ["a", "b", "config.json"]}))
    return stage


def test_only_what_a_killed_run_moved_is_removed(tmp_path: Path) -> None:
    half_moved(tmp_path)
    (tmp_path / "b").write_text("somebody's")
    with pytest.raises(OutputError, match="holds b"):
        write(tmp_path)
    assert content(tmp_path) == {"b": b"somebody's"}


@pytest.mark.parametrize(
    "steps",
    [
        '{"shards": {}, "moves": ["a", "b',
        '["a", "b", "config.json"]',
        '{"shards": {}, "moves": ["../outside", "a", "config.json"]}',
        '{"shards": {"a": ["../../../outside"]}, "moves": ["a", "config.json"]}',
        '{"shards": {"a": [1]}, "moves": ["a", "config.json"]}',
    ],
)
def test_a_broken_or_forged_list_removes_nothing(tmp_path: Path, steps: str) -> None:
    out = tmp_path / "out"
    half_moved(out)
    (tmp_path / "outside").write_text("precious")
    (out / PARTIAL / "finishing.json").write_text(steps)
    with pytest.raises(OutputError, match="holds a"):
        write(out)
    assert (tmp_path / "outside").exists() and (out / "a").exists()


def test_a_run_killed_after_its_last_rename_is_a_checkpoint(tmp_path: Path) -> None:
    stage = half_moved(tmp_path)
    for name in ("b", "config.json"):
        os.replace(stage / name, tmp_path / name)
    with pytest.raises(OutputError, match="not empty"):
        write(tmp_path)
    assert set(content(tmp_path)) == {"a", "b", "config.json"}


def test_what_is_unfinished_is_no_model_to_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    with CheckpointWriter(tmp_path, shard_bytes=SHARD) as target:
        for name, tensor in TENSORS.items():
            target.add(name, tensor)
        with pytest.raises((OSError, ValueError), match=r"config\.json|model_type"):
            AutoConfig.from_pretrained(tmp_path, local_files_only=True)
        target.finish({"config.json": '{"model_type": "gpt2"}'})
    assert AutoConfig.from_pretrained(tmp_path).model_type == "gpt2"
