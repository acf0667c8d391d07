"""Every way a folder of weights can be damaged or hostile: refused on opening, in one line that names the culprit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FIRST = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5, dtype=torch.bfloat16)}
SECOND = {"c.weight": torch.full((2, 2), -2.5, dtype=torch.float16), "d": torch.arange(3)}


def sharded(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Two shards and their index; `changes` go into the weight map."""
    folder.mkdir(exist_ok=True)
    save_file(FIRST, folder / "model-00001-of-00002.safetensors")
    save_file(SECOND, folder / "model-00002-of-00002.safetensors")
    weight_map: dict[str, Any] = {name: "model-00001-of-00002.safetensors" for name in FIRST}
    weight_map |= {name: "model-00002-of-00002.safetensors" for name in SECOND}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {**weight_map, **(changes or {})}}))
    (folder / "config.json").write_text("{}")
    return folder


def refusal(folder: Path) -> str:
    """The one line a damaged folder is refused with."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    line = str(caught.value)
    assert "\n" not in line and caught.value.hint
    return line


def test_nothing_to_read(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "missing")
    assert "no .safetensors" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert "pickle" in refusal(tmp_path) and "save_pretrained" in refusal(tmp_path)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).unlink()
    assert INDEX in refusal(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_shard_is_found_on_opening(tmp_path: Path, keep: int) -> None:
    shard = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    assert "model-00002-of-00002.safetensors is truncated or corrupt" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 300, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"])
def test_a_corrupt_shard(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors is truncated or corrupt" in refusal(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        "../other.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "passwd",
        7,
        None,
    ],
)
def test_an_index_may_not_point_elsewhere(tmp_path: Path, place: Any) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    folder = sharded(tmp_path / "model", {"x": place})
    assert "no plain .safetensors name inside the folder" in refusal(folder)


def test_an_index_that_names_what_a_shard_lacks(tmp_path: Path) -> None:
    folder = sharded(tmp_path, {"ghost.weight": "model-00001-of-00002.safetensors"})
    assert "'ghost.weight'" in refusal(folder)
    folder = sharded(tmp_path, {"a.weight": "model-00002-of-00002.safetensors"})
    assert "'a.weight', which model-00002-of-00002.safetensors does not hold" in refusal(folder)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({**SECOND, "a.weight": torch.zeros(1)}, sharded(tmp_path) / "model-00002-of-00002.safetensors")
    line = refusal(tmp_path)
    assert "'a.weight' is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors" in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "[" * 100_000,
        '"\udcff"',
    ],
)
def test_an_unreadable_index(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert INDEX in refusal(tmp_path)
