"""Activations on disk: the same bytes as in memory, nothing left behind, and clear words when the disk has no room."""

import errno
import os
import weakref

import pytest
import torch
from click.testing import CliRunner

import awq_core
from awq_core import QuantConfig
from awq_core.calibration import offload, stack, trace
from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.offload import ALIGNMENT, OffloadFile, offloading
from awq_core.cli.app import cli
from awq_core.errors import OutputError
from awq_core.quantization import engine

PLAIN = QuantConfig(group_size=32)


def calibration(generator):
    """Batches of unequal counts and lengths, the last of them the longest."""
    shapes = [(3, 20), (1, 33), (2, 7), (4, 40)]
    batches = tuple({"input_ids": torch.randint(1, 127, shape, generator=generator)} for shape in shapes)
    return CalibrationData(batches, "test", 10, sum(a * b for a, b in shapes))


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml")
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(2, 3, 5), (1,), (), (0, 4), (3, 2000)])
def test_a_tensor_comes_back_bit_for_bit(disk, generator, dtype, shape):
    with offloading(disk) as file:
        file.keep(torch.ones(7))
        tensor = (torch.randn(shape, generator=generator) * 3).to(dtype)
        kept = file.keep(tensor)
        file.keep(torch.ones(7))
        back = kept.load()
    assert back.dtype is dtype and back.shape == tensor.shape
    assert torch.equal(back, tensor)


def test_nan_and_the_layout_of_a_transposed_tensor(disk, generator):
    tensor = torch.randn(4, 6, generator=generator).T
    tensor[0, 0] = float("nan")
    with offloading(disk) as file:
        torch.testing.assert_close(file.keep(tensor).load(), tensor, rtol=0, atol=0, equal_nan=True)


def test_writing_to_what_was_loaded_leaves_the_file_alone(disk):
    with offloading(disk) as file:
        kept = file.keep(torch.zeros(3))
        kept.load().add_(1)
        assert kept.load().sum() == 0


def test_a_tensor_is_replaced_in_place_where_it_fits(disk):
    with offloading(disk) as file:
        first, second = file.keep(torch.zeros(3, 4)), file.keep(torch.ones(5))
        first.store(torch.full((2, 2, 2), 7.0, dtype=torch.bfloat16))
        assert first.offset == 0 and first.load().shape == (2, 2, 2) and first.load().dtype is torch.bfloat16
        large = torch.arange(ALIGNMENT, dtype=torch.float32)
        first.store(large)
        assert first.offset == 2 * ALIGNMENT and torch.equal(first.load(), large)
        assert torch.equal(second.load(), torch.ones(5))


def test_the_file_has_no_name_and_is_given_back(disk):
    with offloading(disk) as file:
        file.keep(torch.zeros(1 << 18))
        assert list(disk.iterdir()) == [], "a killed run would leave it"
        size = os.fstat(file._file.fileno())
        assert size.st_size >= 1 << 20 and size.st_blocks * 512 >= 1 << 20, "the space must be reserved"
        file.clear()
        assert os.fstat(file._file.fileno()).st_blocks == 0
    assert file._file.closed


def test_results_are_the_same_bytes(llama_source, tmp_path, disk, generator):
    data = calibration(generator)
    memory = awq_core.quantize(llama_source, tmp_path / "memory", config=PLAIN, calibration=data)
    on_disk = awq_core.quantize(llama_source, tmp_path / "on-disk", config=PLAIN, calibration=data, offload=disk)
    assert on_disk.reports == memory.reports
    assert contents(tmp_path / "on-disk") == contents(tmp_path / "memory")
    assert list(disk.iterdir()) == []


def test_a_run_that_stopped_goes_on_with_or_without(llama_source, tmp_path, disk, generator):
    data = calibration(generator)
    awq_core.quantize(llama_source, tmp_path / "whole", config=PLAIN, calibration=data)

    def stop(event):
        if getattr(event, "done", 0) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        awq_core.quantize(llama_source, tmp_path / "out", config=PLAIN, calibration=data, offload=disk, progress=stop)
    awq_core.quantize(llama_source, tmp_path / "out", config=PLAIN, calibration=data)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_one_batch_at_a_time_is_in_memory(llama_source, tmp_path, disk, generator, monkeypatch):
    """Tensors handed to blocks, counted while they live."""
    living = weakref.WeakSet()
    most = []

    def spy(kept):
        tensor = offload.load(kept)
        living.add(tensor)
        most.append(len(living))
        return tensor

    recorded = []

    def record(*args, **options):
        recorded.append(trace.record(*args, **options))
        return recorded[-1]

    monkeypatch.setattr(stack, "load", spy)
    monkeypatch.setattr(engine, "record", record)
    awq_core.quantize(llama_source, tmp_path / "out", config=PLAIN, calibration=calibration(generator), offload=disk)
    assert most and max(most) <= 2  # the one before dies when the next takes its name
    assert all(isinstance(kept, offload.Offloaded) for kept in recorded[0].hidden)


def test_differences_that_a_model_adds_between_blocks_are_kept_on_disk(disk):
    class Adding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Identity() for _ in range(3)])

        def forward(self, x, use_cache=False):
            for block in self.blocks:
                x = block(x + 10)
            return x

    model = Adding()
    with offloading(disk) as file:
        inputs = trace.record(
            model, list(model.blocks), [{"x": torch.zeros(2, 3)}, {"x": torch.ones(1, 5)}], offload=file
        )
        assert isinstance(inputs.calls[2][1].between, offload.Offloaded)
        inputs.advance(0, model.blocks[0])
        inputs.advance(1, model.blocks[1])
        assert [float(offload.load(kept).unique()) for kept in inputs.hidden] == [30.0, 31.0]


def test_a_second_stack_takes_the_place_of_the_first(disk):
    model = torch.nn.Sequential(torch.nn.Identity())
    model.forward = lambda x, use_cache=False: model[0](x)
    with offloading(disk) as file:
        for _ in range(3):
            inputs = trace.record(model, list(model), [{"x": torch.zeros(1, 4, 8)}], offload=file)
            assert inputs.hidden[0].offset == 0
            assert os.fstat(file._file.fileno()).st_size == ALIGNMENT


def test_the_file_is_closed_after_an_error(llama_source, tmp_path, disk, generator, monkeypatch):
    made = []

    class Noted(OffloadFile):
        def __init__(self, folder):
            super().__init__(folder)
            made.append(self)

    monkeypatch.setattr(offload, "OffloadFile", Noted)
    monkeypatch.setattr(engine, "quantize_block", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        awq_core.quantize(
            llama_source, tmp_path / "out", config=PLAIN, calibration=calibration(generator), offload=disk
        )
    assert made[0]._file.closed and list(disk.iterdir()) == []


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_before_anything_is_written(llama_source, tmp_path, disk, generator, monkeypatch, one_line):
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError) as caught:
        awq_core.quantize(
            llama_source, tmp_path / "out", config=PLAIN, calibration=calibration(generator), offload=disk
        )
    one_line(caught.value, "disk full", str(disk), "MiB free", "--offload", "--samples")
    assert not (tmp_path / "out").exists()


def test_a_file_system_that_cannot_reserve_is_written_to_all_the_same(disk, monkeypatch):
    def unable(*args):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    with offloading(disk) as file:
        assert torch.equal(file.keep(torch.arange(5)).load(), torch.arange(5))
        monkeypatch.setattr(file, "_file", Full(file._file))
        with pytest.raises(OutputError, match="disk full"):
            file.keep(torch.arange(5))


class Full:
    """A file on a disk that is full."""

    def __init__(self, file):
        self.file = file
        self.write = full

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_missing_folder_is_refused_first(tmp_path, llama_source):
    """By the program too, which hands the option on."""
    words = ["quantize", llama_source, "--out", tmp_path / "out", "--offload", tmp_path / "none"]
    result = CliRunner().invoke(cli, [str(word) for word in words])
    (line,) = result.stderr.splitlines()
    assert f"--offload {tmp_path / 'none'}: no such folder" in line and result.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_permission_is_refused(disk, monkeypatch, one_line):
    """Root may write anywhere, so the refusal is made up."""

    def refuse(**options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(disk))

    monkeypatch.setattr(offload.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError) as caught:
        OffloadFile(disk)
    one_line(caught.value, str(disk), "Permission denied", "another folder")
