"""Reading tensors and fingerprints. `test_shards.py` has the folders that are refused on opening."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from awq_core.checkpoint.reader import CheckpointReader, fingerprint
from awq_core.errors import AwqError, CheckpointError, NumericsError

INDEX = "model.safetensors.index.json"
FIRST = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5, dtype=torch.bfloat16)}
SECOND = {"c.weight": torch.full((2, 2), -2.5, dtype=torch.float16), "d": torch.arange(3)}


def sharded(folder: Path) -> Path:
    """Two shards and their index."""
    folder.mkdir(exist_ok=True)
    save_file(FIRST, folder / "model-00001-of-00002.safetensors")
    save_file(SECOND, folder / "model-00002-of-00002.safetensors")
    weight_map = {name: "model-00001-of-00002.safetensors" for name in FIRST}
    weight_map |= {name: "model-00002-of-00002.safetensors" for name in SECOND}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def test_shards(tmp_path: Path) -> None:
    with CheckpointReader(sharded(tmp_path)) as reader:
        assert reader.folder == tmp_path
        assert set(reader.names) == {*FIRST, *SECOND} and set(reader.names[:2]) == set(FIRST)
        assert reader.names == CheckpointReader(str(tmp_path)).names
        assert "a.weight" in reader and "z" not in reader
        assert reader.total_bytes == 12 * 4 + 5 * 2 + 4 * 2 + 3 * 8
        for name, tensor in {**FIRST, **SECOND}.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.dtype(name) == tensor.dtype
            assert reader.nbytes(name) == tensor.numel() * tensor.element_size()
            read = reader.tensor(name)
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)
        with pytest.raises(CheckpointError, match="no tensor 'z'"):
            reader.tensor("z")


def test_rows(tmp_path: Path) -> None:
    with CheckpointReader(sharded(tmp_path)) as reader:
        for name in ("a.weight", "b.weight"):
            whole = reader.tensor(name)
            for first, end in ((0, 1), (1, 3), (2, 3), (1, 99), (2, 2)):
                part = reader.tensor(name, rows=(first, end), dtype=torch.float64)
                assert part.dtype is torch.float64 and torch.equal(part, whole[first:end].double())


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model-fp16.safetensors"])
def test_one_file_of_any_name(tmp_path: Path, name: str) -> None:
    save_file(FIRST, tmp_path / name)
    assert torch.equal(CheckpointReader(tmp_path).tensor("a.weight"), FIRST["a.weight"])


def test_the_usual_name_wins_over_other_files(tmp_path: Path) -> None:
    save_file(FIRST, tmp_path / "model.safetensors")
    save_file(SECOND, tmp_path / "consolidated.safetensors")
    assert set(CheckpointReader(tmp_path).names) == set(FIRST)


def test_linked_shards_are_read(tmp_path: Path) -> None:
    # The hub's cache keeps files elsewhere and links them into the folder.
    source, folder = sharded(tmp_path / "blobs"), tmp_path / "snapshot"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    assert torch.equal(CheckpointReader(folder).tensor("d"), SECOND["d"])


def test_dtypes(tmp_path: Path) -> None:
    tensors = {
        "f8": torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn),
        "i4": torch.tensor([-(2**31)], dtype=torch.int32),
        "flag": torch.tensor([True, False]),
        "one": torch.tensor(3.0),
        "none": torch.empty(0, 4),
        "f16": torch.tensor([0.5], dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            read = reader.tensor(name)
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            assert torch.equal(read.float(), tensor.float())
        assert reader.tensor("f16", dtype=torch.float32).dtype == torch.float32
        assert reader.tensor("i4", dtype=torch.float32).dtype == torch.int32, "whole numbers are not cast"


def test_a_tensor_is_not_shared_between_reads(tmp_path: Path) -> None:
    save_file(FIRST, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        reader.tensor("a.weight").zero_()
        assert torch.equal(reader.tensor("a.weight"), FIRST["a.weight"])
        reader.close()
        assert torch.equal(reader.tensor("a.weight"), FIRST["a.weight"]), "a closed reader opens its files again"


def test_threads(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4000,), float(i)) for i in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    wrong: list[str] = []
    with CheckpointReader(tmp_path) as reader:

        def work(name: str) -> None:
            for _ in range(20):
                if not torch.equal(reader.tensor(name), tensors[name]):
                    wrong.append(name)

        reader.tensor("t0")
        threads = [threading.Thread(target=work, args=(name,)) for name in tensors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_inf_are_named(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(7, 9, dtype=dtype)
    bad[3, 8] = value
    save_file({"fine": torch.ones(3), "layers.3.bad": bad}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        reader.tensor("fine")
        with pytest.raises(NumericsError, match=r"layers\.3\.bad holds NaN or inf"):
            reader.tensor("layers.3.bad")
        assert not torch.isfinite(reader.tensor("layers.3.bad", check_finite=False)).all()


def test_nan_is_found_in_every_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_core.checkpoint.reader._CHUNK", 4)
    for place in (0, 5, 10):
        bad = torch.zeros(11)
        bad[place] = float("nan")
        save_file({"bad": bad}, tmp_path / "model.safetensors")
        with CheckpointReader(tmp_path) as reader, pytest.raises(NumericsError):
            reader.tensor("bad")


def test_a_cast_that_overflows_is_named(tmp_path: Path) -> None:
    save_file({"big": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        with pytest.raises(NumericsError, match=r"big overflows torch\.float16"):
            reader.tensor("big", dtype=torch.float16)
        assert reader.tensor("big", dtype=torch.bfloat16).isfinite().all()


def test_a_shard_that_shrinks_while_open(tmp_path: Path) -> None:
    save_file(FIRST, tmp_path / "model.safetensors")
    with CheckpointReader(tmp_path) as reader:
        with open(tmp_path / "model.safetensors", "r+b") as file:
            file.truncate(100)
        with pytest.raises(CheckpointError, match="became shorter"):
            reader.tensor("a.weight")


def test_a_shard_that_disappears_while_open(tmp_path: Path) -> None:
    with CheckpointReader(sharded(tmp_path)) as reader:
        (tmp_path / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors cannot be read"):
            reader.tensor("a.weight")


def test_fingerprint(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    first = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == first, "neither the place nor the dates count"
    assert len(first) == 64

    (folder / "config.json").write_text('{"changed": 1}')
    assert fingerprint(folder) != first
    (folder / "config.json").write_text("{}")
    assert fingerprint(folder) == first

    shard = folder / "model-00002-of-00002.safetensors"
    save_file({**SECOND, "c.weight": SECOND["c.weight"] + 1}, shard)
    assert fingerprint(folder) != first, "another fine-tune has the same header"
    save_file({"c.weight": torch.zeros(1, 4, dtype=torch.float16), "d": SECOND["d"]}, shard)
    assert fingerprint(folder) != first


def test_fingerprint_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(AwqError, match="is not a folder"):
        fingerprint(tmp_path / "missing")
