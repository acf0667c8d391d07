"""Joining parts: byte for byte what save_file makes of the same tensors, in little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from awq_core.checkpoint.assemble import METADATA, concatenate
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import CheckpointError

DTYPES = [
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "int64", "int32", "int16", "int8", "bool"),
        *("uint64", "uint32", "uint16", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
    )
    if hasattr(torch, name)
]
NAMES = ["z", "a", "A", "layers.10", "layers.9", 'q"\\/', "\n\t\x01\x7f\b", "ü", "\U0001f600", "\uffff", "", "a.b"]
SHAPES = [(), (3,), (0,), (2, 5), (1, 1, 7), (4, 0)]


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of every dtype, shape and kind of name, in an order that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for index in torch.randperm(len(DTYPES) * len(NAMES), generator=generator).tolist():
        dtype, name = DTYPES[index % len(DTYPES)], NAMES[index // len(DTYPES)]
        if name in ("", "a") and index % len(DTYPES):
            name += str(dtype)
        elif name not in ("", "a"):
            name = f"{name}{index % len(DTYPES)}"
        shape = SHAPES[index % len(SHAPES)]
        count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        data = torch.randint(0, 2, (count,), dtype=torch.uint8, generator=generator)
        result[name] = data.view(dtype).reshape(shape)
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_bytes_are_those_of_save_file(tmp_path: Path, seed: int, count: int) -> None:
    given = tensors(seed)
    names = list(given)
    parts = []
    for i in range(count):
        parts.append(tmp_path / f"{i}.safetensors")
        save_file({name: given[name] for name in names[i::count]}, parts[-1], metadata=METADATA)
    save_file(given, tmp_path / "expected", metadata=METADATA)
    concatenate(parts, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "expected").read_bytes()


def test_the_writer_makes_the_bytes_of_save_file(tmp_path: Path) -> None:
    given = tensors(0)
    with CheckpointWriter(tmp_path / "out") as target:
        target.begin({})
        for i, (name, tensor) in enumerate(given.items()):
            target.add(name, tensor)
            if i % 5 == 4:
                target.commit(name, {})
        target.finish({"config.json": "{}"})
    save_file(given, tmp_path / "expected", metadata=METADATA)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_damaged_part(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "a")
    save_file({"b": torch.ones(100)}, tmp_path / "b")
    with open(tmp_path / "b", "r+b") as file:
        file.truncate(200)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        concatenate([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_tensors_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awq_core.checkpoint.assemble._CHUNK", 100)
    given = {"a": torch.arange(1000.0), "b": torch.arange(25), "c": torch.arange(25.0)}
    for name, tensor in given.items():
        save_file({name: tensor}, tmp_path / name)
    concatenate([tmp_path / name for name in given], tmp_path / "joined")
    read = load_file(tmp_path / "joined")
    assert set(read) == set(given) and all(torch.equal(read[name], tensor) for name, tensor in given.items())


def memory(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory can be reset on Linux only")
def test_the_memory_it_takes(tmp_path: Path) -> None:
    unit, count = 4 << 20, 24
    with CheckpointWriter(tmp_path / "out") as target:
        target.begin({})
        for i in range(count):
            target.add(f"layers.{i}", torch.full((unit,), i, dtype=torch.uint8))
            target.commit(f"layers.{i}", {})
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")
        target.finish({"config.json": "{}"})
        assert memory("VmHWM") - before < unit + (8 << 20), "the shard has 96 MiB"
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:100_000]
    assert len(json.JSONDecoder().raw_decode(header.decode(errors="replace"))[0]) == count + 1
