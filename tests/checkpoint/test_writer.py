"""Writing: shards, index and files, the same bytes every time. `test_partial.py` has what goes wrong meanwhile."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from awq_core.checkpoint.partial import PARTIAL
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import OutputError

INDEX = "model.safetensors.index.json"
TENSORS = {f"layers.{i}.weight": torch.full((64,), float(i)) for i in range(10)}  # 256 bytes each
SHARD = 3 * 256  # three of them to a shard, so four shards
FILES: dict[str, bytes | str | Path] = {"config.json": "{}", "merges.txt": b"a b\n"}


def write(out: Path, **files: bytes | str | Path) -> None:
    with CheckpointWriter(out, shard_bytes=SHARD) as target:
        for name, tensor in TENSORS.items():
            target.add(name, tensor)
        target.finish({**FILES, **files})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_and_index(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out)
    shards = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sorted(content(out)) == sorted([*shards, INDEX, "config.json", "merges.txt"]), "and no partial folder"
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2560}
    assert index["weight_map"] == {name: shards[i // 3] for i, name in enumerate(TENSORS)}
    assert (out / "merges.txt").read_bytes() == b"a b\n"
    with CheckpointReader(out) as reader:
        assert reader.total_bytes == 2560
        assert all(torch.equal(reader.tensor(name), tensor) for name, tensor in TENSORS.items())
    with safe_open(out / shards[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert len(modes) == 1, "shards have the permissions of the other files"


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as target:
        target.add("a", torch.ones(2))
        target.finish({"config.json": b"{}"})
    assert set(content(tmp_path / "out")) == {"model.safetensors", "config.json"}


def test_an_existing_empty_folder_is_used(tmp_path: Path) -> None:
    write(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=100) as target:
        for name, size in (("small", 4), ("huge", 1000), ("last", 4)):
            target.add(name, torch.ones(size))
        target.finish(FILES)
    assert len(set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values())) == 3


def test_the_buffer_holds_no_more_than_a_shard(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", shard_bytes=SHARD) as target:
        for i, (name, tensor) in enumerate(TENSORS.items(), 1):
            target.add(name, tensor)
            assert len(list((target.out / PARTIAL / "parts").iterdir())) == i // 3
        target.finish(FILES)


def test_views_and_shared_memory(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    given = {"t": base.t(), "row": base[1], "base": base, "tied": base, "step": base[:, ::2], "empty": base[:0]}
    given |= {"parameter": torch.nn.Parameter(torch.ones(3)), "f8": torch.ones(4).to(torch.float8_e4m3fn)}
    with CheckpointWriter(tmp_path / "out") as target:
        for name, tensor in given.items():
            target.add(name, tensor)
        target.finish(FILES)
    with CheckpointReader(tmp_path / "out") as reader:
        for name, tensor in given.items():
            read = reader.tensor(name)
            assert read.shape == tensor.shape and read.dtype == tensor.dtype
            assert torch.equal(read.float(), tensor.detach().float())


def test_a_slice_does_not_hold_on_to_the_whole(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path) as target:
        target.add("expert.0", torch.ones(100, 8)[0])
        assert target._parts._buffer["expert.0"].untyped_storage().nbytes() == 8 * 4
        target.finish(FILES)


def test_files_of_every_kind(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text("{}")
    link = tmp_path / "link.json"
    link.symlink_to(source)
    files = {"tokenizer.json": source, "copied.json": link, "sub/template.jinja": "ü", "raw": b"\0\xff"}
    write(tmp_path / "out", **files)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "copied.json").read_text() == "{}" and not (out / "copied.json").is_symlink()
    assert (out / "sub" / "template.jinja").read_text(encoding="utf-8") == "ü"
    assert (out / "raw").read_bytes() == b"\0\xff"


def test_the_same_calls_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_misuse(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=r"twin was added twice"), CheckpointWriter(out, shard_bytes=1) as target:
        target.add("twin", torch.ones(1))
        target.add("twin", torch.ones(1))
    with pytest.raises(OutputError, match=r"needs a config\.json"), CheckpointWriter(out) as target:
        target.add("a", torch.ones(1))
        target.finish({})
    with pytest.raises(OutputError, match="none was added"), CheckpointWriter(out) as target:
        target.finish(FILES)
    with pytest.raises(OutputError, match="was not finished"), CheckpointWriter(out) as target:
        target.add("a", torch.ones(1))
    assert not out.exists()
    with CheckpointWriter(out) as target:
        target.add("a", torch.ones(1))
        target.finish(FILES)
        with pytest.raises(OutputError, match="finished already"):
            target.add("b", torch.ones(1))
        with pytest.raises(OutputError, match="finished already"):
            target.finish(FILES)
    assert (out / "config.json").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", f"{PARTIAL}/x", "model.safetensors"])
def test_names_that_are_taken_or_lead_outside(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError), CheckpointWriter(tmp_path / "out") as target:
        target.add("a", torch.ones(1))
        target.finish({"config.json": "{}", name: "text"})
    assert list(tmp_path.iterdir()) == []
