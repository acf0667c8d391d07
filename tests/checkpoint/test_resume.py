"""Going on with an unfinished run, or refusing to. `test_kill.py` is about dying, this about everything else."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from awq_core.checkpoint import parts
from awq_core.checkpoint.journal import Journal
from awq_core.checkpoint.partial import PARTIAL
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import OutputError

FILES: dict[str, bytes | str | Path] = {"config.json": "{}", "merges.txt": b"a b\n", "z.txt": "last"}
IDENTITY = {"model": "tiny", "search": {"grid": 20, "clip": True}}
KEYS = [f"layers.{i}" for i in range(6)]
SHARD = 700  # two units


def tensors(key: str) -> dict[str, torch.Tensor]:
    return {f"{key}.{name}": torch.full((size,), float(key[-1])) for name, size in (("weight", 64), ("bias", 16))}


def work(out: Path, stop: str = "", error: BaseException | None = None, **arguments: Any) -> list[str]:
    """A whole run, or until it has added the tensors of `stop`; returns the keys of the units it did itself."""
    identity: Mapping[str, Any] = arguments.pop("identity", IDENTITY)
    done = []
    with CheckpointWriter(out, shard_bytes=SHARD, **arguments) as writer:
        writer.begin(identity)
        for key in KEYS:
            if key in writer.finished:
                continue
            for name, tensor in tensors(key).items():
                writer.add(name, tensor)
            if key == stop:
                raise error or RuntimeError("stopped")
            writer.commit(key, {"loss": float(key[-1]) / 7})
            done.append(key)
        if not writer.complete:
            writer.finish(FILES)
    return done


def stopped(out: Path, stop: str = "layers.3", **arguments: Any) -> Path:
    with pytest.raises(RuntimeError, match="stopped"):
        work(out, stop, **arguments)
    return out


def stopped_moving(out: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> Path:
    """A run that dies before it moves the file of this name into place."""
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target) == out / at:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", failing)
        work(out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    assert work(tmp_path / "undisturbed") == KEYS
    return content(tmp_path / "undisturbed")


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OutputError("quality")])
def test_an_exception_keeps_what_was_committed(
    tmp_path: Path, expected: dict[str, bytes], error: BaseException
) -> None:
    out = tmp_path / "out"
    with pytest.raises(type(error)):
        work(out, "layers.3", error)
    assert {path.name for path in out.iterdir()} == {PARTIAL}
    left = {path.name for path in (out / PARTIAL / "parts").iterdir()}
    assert left == {f"0000{i}.safetensors" for i in (1, 2, 3)}, "layers.3 was added, not committed"
    assert work(out) == KEYS[3:]
    assert content(out) == expected


def test_without_a_commit_nothing_is_left(tmp_path: Path, expected: dict[str, bytes]) -> None:
    stopped(tmp_path / "out", "layers.0")
    assert not (tmp_path / "out").exists()
    (tmp_path / "made").mkdir()
    stopped(tmp_path / "made", "layers.0")
    assert list((tmp_path / "made").iterdir()) == []


def test_leaving_without_finish_keeps_what_was_committed(tmp_path: Path, expected: dict[str, bytes]) -> None:
    with (
        pytest.raises(OutputError, match="was not finished: what was committed is kept"),
        CheckpointWriter(tmp_path / "out", shard_bytes=SHARD) as writer,
    ):
        assert writer.begin(IDENTITY) is False and not writer.resumable
        for name, tensor in tensors(KEYS[0]).items():
            writer.add(name, tensor)
        writer.commit(KEYS[0], {})
        assert writer.resumable and not writer.complete
    assert work(tmp_path / "out") == KEYS[1:]
    assert content(tmp_path / "out") == expected


def test_what_a_resumed_run_knows(tmp_path: Path) -> None:
    odd = {
        "nan": torch.tensor([math.nan, math.inf, -0.0]),
        "half": torch.rand(3).bfloat16(),
        "none": torch.ones(3, 0),
        "scalar": torch.ones(()),
    }
    payload = {"loss": 0.1 + 0.2, "least": 5e-324, "none": None, "pair": (1, 2), "big": 2**70, "nan": math.nan}
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path) as writer:
        assert writer.begin({"of": ("two", "parts")}) is False
        for name, tensor in odd.items():
            writer.add(name, tensor)
        writer.commit("odd", payload)
        writer.commit("empty", {})
        first, size = writer.finished, writer.total_bytes
        assert [*writer.stored("odd")] == [*odd] and writer.stored("empty") == {}
        raise RuntimeError
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path) as writer:
        assert writer.begin({"of": ["two", "parts"]}) is True and not writer.complete
        assert [*writer.finished] == ["odd", "empty"] and repr(writer.finished) == repr(first)
        assert writer.finished["odd"]["loss"] == 0.30000000000000004 and writer.finished["odd"]["pair"] == [1, 2]
        assert writer.total_bytes == size
        stored = writer.stored("odd")
        for name, tensor in odd.items():
            assert stored[name].shape == tensor.shape and stored[name].dtype == tensor.dtype
            assert torch.equal(stored[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        stored["scalar"].zero_()
        assert writer.stored("odd")["scalar"] == 1, "edited in memory of its own"
        with pytest.raises(OutputError, match="scalar was added twice"):
            writer.add("scalar", torch.ones(1))
        with pytest.raises(OutputError, match="odd was committed twice"):
            writer.commit("odd", {})
        raise RuntimeError


def test_units_of_a_shard_and_more_are_moved_not_copied(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with CheckpointWriter(out, shard_bytes=100) as writer:
        writer.begin({})
        for key, sizes in {"a": (30,), "b": (70,), "c": (60, 30), "d": (20,), "e": (500, 10), "f": (95,)}.items():
            for i, size in enumerate(sizes):
                writer.add(f"{key}{i}", torch.zeros(size, dtype=torch.uint8))
            writer.commit(key, {})
        files = {path.name[:5]: path.stat().st_ino for path in (out / PARTIAL / "parts").iterdir()}
        writer.finish(FILES)
    shards: dict[str, str] = {}
    for name, shard in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].items():
        shards[shard] = shards.get(shard, "") + name
    assert list(shards.values()) == ["a0b0", "c0c1", "d0", "e0", "e1", "f0"]
    made = [os.stat(out / shard).st_ino for shard in shards]
    assert made[1:] == [files[f"0000{i}"] for i in (3, 4, 5, 6, 7)] and made[0] not in files.values()


def test_other_settings_are_refused(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out")
    before = content(out)
    search = {"grid": 10, "clip": True}
    with pytest.raises(OutputError) as caught:
        work(out, identity={"model": "tiny", "search": search, "samples": 128})
    assert str(caught.value) == (
        f"{out} holds an unfinished run with other settings: search.grid was 20, is now 10; samples was absent, is now "
        "128 (give the same arguments to go on with it, --restart to begin again, or another --out)"
    )
    with pytest.raises(
        OutputError, match=r": a was absent, is now 0; b .* 1; c .* 2; d .* 3; and 5 more \(give"
    ) as caught:
        work(out, identity=dict(zip("abcdef", range(6), strict=True)))
    assert "\n" not in str(caught.value) and "model" not in str(caught.value)
    changed = r"settings: writer\.shard_bytes was 700, is now 536870912 \("
    with pytest.raises(OutputError, match=changed), CheckpointWriter(out) as writer:
        writer.begin(IDENTITY)
    assert content(out) == before
    assert work(out) == KEYS[3:] and content(out) == expected


def test_other_settings_are_fine_where_nothing_is_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / PARTIAL / "parts").mkdir(parents=True)
    Journal.create(out / PARTIAL / "journal.jsonl", {"of": "a run killed before its first commit"})
    (out / PARTIAL / "parts" / "00001.tmp").write_text("torn")
    assert work(out) == KEYS and PARTIAL not in {path.name for path in out.iterdir()}


def test_a_refused_begin_does_not_let_the_caller_go_on(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out")
    with pytest.raises(OutputError, match=r"begin\(\) failed"), CheckpointWriter(out, shard_bytes=SHARD) as writer:
        with pytest.raises(OutputError, match="other settings"):
            writer.begin({})
        writer.add("a", torch.ones(1))
    assert work(out) == KEYS[3:] and content(out) == expected


def test_restart(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out", identity={"model": "other"})
    assert work(out, restart=True) == KEYS and content(out) == expected
    assert work(tmp_path / "new", restart=True) == KEYS, "nothing to clear is fine"


@pytest.mark.parametrize("at", ["merges.txt", "model-00002-of-00003.safetensors", "config.json"])
def test_stopped_amid_the_last_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], at: str
) -> None:
    out = stopped_moving(tmp_path / "out", monkeypatch, at)
    assert not (out / "config.json").exists()
    with CheckpointWriter(out, shard_bytes=SHARD) as writer:
        assert writer.begin(IDENTITY) is True and writer.complete
        assert [*writer.finished] == KEYS
        with pytest.raises(OutputError, match="finished already"):
            writer.add("a", torch.ones(1))
        with pytest.raises(OutputError, match="finished already"):
            writer.stored(KEYS[0])
    assert content(out) == expected
    out = stopped_moving(tmp_path / "again", monkeypatch, at)
    with pytest.raises(OutputError, match=r"model was \"tiny\", is now absent"):
        work(out, identity={})
    assert work(out, restart=True) == KEYS and content(out) == expected


def test_stopped_amid_the_last_moves_without_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the work is in what is about to be moved, so it is worth keeping too."""
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    again = r"finishing .* failed before \(run the same command again\)"
    with pytest.raises(OutputError, match=again), CheckpointWriter(tmp_path / "out") as writer:
        writer.begin(IDENTITY)
        writer.add("a", torch.ones(1))
        with (
            monkeypatch.context() as patch,
            pytest.raises(OutputError, match=r"disk full .*it resumes where"),
        ):
            patch.setattr(os, "replace", failing)
            writer.finish(FILES)
        writer.finish(FILES)
    with CheckpointWriter(tmp_path / "out") as writer:
        assert writer.begin(IDENTITY) is True and writer.complete and writer.finished == {}
    assert set(content(tmp_path / "out")) == {*FILES, "model.safetensors"}


@pytest.mark.parametrize("how", [{"identity": {}}, {"restart": True}])
def test_a_run_that_died_after_its_last_move_is_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes], how: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("awq_core.checkpoint.partial.PartialFolder.close", lambda self: os.close(self._lock))
        work(out)
    assert (out / PARTIAL / "finishing.json").exists()
    with pytest.raises(OutputError, match="not empty"):
        work(out, **how)
    assert content(out) == expected, "and the partial folder is gone"


def test_a_file_of_somebody_else(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out")
    for how in ({}, {"restart": True}):
        (out / "merges.txt").write_text("somebody's")
        before = content(out)
        with pytest.raises(OutputError, match=r"not empty: it holds merges\.txt"):
            work(out, **how)
        assert content(out) == before, "nothing is touched, the unfinished run included"
    (out / "merges.txt").unlink()
    assert work(out) == KEYS[3:] and content(out) == expected


def test_a_file_that_appears_while_finishing(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out", "layers.5")
    with pytest.raises(OutputError, match="appeared while"), CheckpointWriter(out, shard_bytes=SHARD) as writer:
        writer.begin(IDENTITY)
        for name, tensor in tensors("layers.5").items():
            writer.add(name, tensor)
        (out / "z.txt").write_text("somebody's")
        writer.commit("layers.5", {})
        writer.finish(FILES)
    with pytest.raises(OutputError, match=r"holds z\.txt"):
        work(out)
    (out / "z.txt").unlink()
    assert work(out) == [] and content(out) == expected


def test_a_moved_file_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]) -> None:
    out = stopped_moving(tmp_path / "out", monkeypatch, "z.txt")
    (out / "merges.txt").unlink()
    with pytest.raises(OutputError, match=r"unfinished run in .* damaged: .*merges\.txt is gone .*--restart"):
        work(out)
    assert work(out, restart=True) == KEYS and content(out) == expected


@pytest.mark.parametrize("damage", ["gone", "short", "journal"])
def test_damage_costs_what_came_after(tmp_path: Path, expected: dict[str, bytes], damage: str) -> None:
    out = stopped(tmp_path / "out", "layers.4")
    second, journal = out / PARTIAL / "parts" / "00002.safetensors", out / PARTIAL / "journal.jsonl"
    if damage == "gone":
        second.unlink()
    elif damage == "short":
        os.truncate(second, 100)
    else:
        os.truncate(journal, len(b"".join(journal.read_bytes().splitlines(True)[:3])) - 1)
    again = stopped(out, "layers.3")
    assert len(list((again / PARTIAL / "parts").iterdir())) == 3, "the orphans are removed"
    assert work(again) == KEYS[3:] and content(out) == expected


def test_what_no_unit_has_is_removed(tmp_path: Path) -> None:
    out = stopped(tmp_path / "out")
    before = content(out)
    for orphan in ("parts/00004.safetensors", "parts/00004.tmp", "stage/config.json", "journal.jsonl.tmp"):
        (out / PARTIAL / orphan).parent.mkdir(exist_ok=True)
        (out / PARTIAL / orphan).write_text("of a unit that was not committed")
    with pytest.raises(RuntimeError), CheckpointWriter(out, shard_bytes=SHARD) as writer:
        writer.begin(IDENTITY)
        assert content(out) == before
        raise RuntimeError


def test_a_journal_torn_at_its_first_write(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out")
    os.truncate(out / PARTIAL / "journal.jsonl", 10)
    assert work(out) == KEYS and content(out) == expected


def test_a_second_run_is_refused(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out")
    with CheckpointWriter(out, shard_bytes=SHARD) as first:
        first.begin(IDENTITY)
        for how in ({}, {"restart": True}):
            with pytest.raises(OutputError, match="another run is writing"):
                work(out, **how)
        for key in KEYS[3:]:
            for name, tensor in tensors(key).items():
                first.add(name, tensor)
            first.commit(key, {})
        first.finish(FILES)
    assert content(out) == expected


def test_a_caller_that_does_not_begin(tmp_path: Path, expected: dict[str, bytes]) -> None:
    out = stopped(tmp_path / "out")
    before = content(out)
    with pytest.raises(ZeroDivisionError), CheckpointWriter(out):
        raise ZeroDivisionError  # before it came to begin
    assert content(out) == before
    with CheckpointWriter(out, shard_bytes=SHARD) as writer:
        for key in KEYS:
            for name, tensor in tensors(key).items():
                writer.add(name, tensor)
        writer.finish(FILES)
    assert content(out) == expected, "the unfinished run was cleared, as ever; units make no difference to the bytes"


def test_a_full_disk_within_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, bytes]
) -> None:
    """The caller may also make room and repeat the call."""
    out = stopped(tmp_path / "out", "layers.1")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(out, shard_bytes=SHARD) as writer:
        writer.begin(IDENTITY)
        for key in KEYS[1:]:
            for name, tensor in tensors(key).items():
                writer.add(name, tensor)
            for owner, victim in ((parts, "save_file"), (os, "fsync"), (os, "replace"), (Journal, "_rewrite")):
                with monkeypatch.context() as patch:
                    patch.setattr(owner, victim, full)
                    with pytest.raises(OutputError, match=r"disk full .*free space and run the same command again"):
                        writer.commit(key, {})
            writer.commit(key, {})
        writer.finish(FILES)
    assert content(out) == expected


def test_a_full_disk_while_finishing_and_another_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(tmp_path / "out") as writer:
        writer.begin(IDENTITY)
        writer.add("a", torch.ones(1))
        with monkeypatch.context() as patch:
            patch.setattr("awq_core.checkpoint.finishing.write_whole", full)
            with pytest.raises(OutputError, match="disk full"):
                writer.finish({**FILES, "left.txt": "of the first attempt"})
        writer.finish(FILES)
    assert set(content(tmp_path / "out")) == {*FILES, "model.safetensors"}


def test_a_full_disk_while_adding_loses_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointWriter(tmp_path / "out", shard_bytes=SHARD) as writer:
        writer.add("a", torch.ones(100))
        with monkeypatch.context() as patch:
            patch.setattr(parts, "save_file", full)
            with pytest.raises(OutputError, match="disk full"):
                writer.add("b", torch.ones(100))
        writer.add("b", torch.ones(100))
        writer.finish(FILES)
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == 800


def test_misuse(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "a") as writer:
        with pytest.raises(OutputError, match=r"commit\(\) needs begin"):
            writer.commit("unit", {})
        with pytest.raises(OutputError, match="no JSON value"):
            writer.begin({"a": object()})
        assert writer.begin({"a": 1}) is False
        with pytest.raises(OutputError, match=r"begin\(\) comes once"):
            writer.begin({"a": 1})
        with pytest.raises(OutputError, match="unit x was not committed"):
            writer.stored("x")
        writer.add("a", torch.ones(1))
        with pytest.raises(OutputError, match="no JSON value"):
            writer.commit("unit", {"a": object()})
        writer.commit("unit", {})
        writer.finish(FILES)
    with CheckpointWriter(tmp_path / "b") as writer:
        writer.add("a", torch.ones(1))
        with pytest.raises(OutputError, match=r"begin\(\) comes once, and first"):
            writer.begin({})
        writer.finish(FILES)
