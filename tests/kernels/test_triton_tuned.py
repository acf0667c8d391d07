"""`awq tune`: the search with a made-up GPU, the file it keeps, and who reads it. No GPU, no Triton."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from awq_core.cli import tune as command
from awq_core.cli.app import cli
from awq_core.errors import NumericsError
from awq_core.kernels.triton import tiles, tune, tuned
from awq_core.kernels.triton.tiles import Tile, choose, choose_default
from awq_core.kernels.triton.tune import FORMS, Best, Shape, search

SHAPE = Shape(4096, 4096, 128)
KEY = ("sm_90", torch.bfloat16, 4096, 4096, 128, 8)
DEFAULT = choose_default("sm_90", 132, 4096, 4096, 128, 1)
BEST = Tile(64, 8, 4, 4, 3)


@pytest.fixture(autouse=True)
def own_table(monkeypatch, tmp_path):
    monkeypatch.setattr(tiles, "TUNED", {})
    monkeypatch.setattr(tuned, "TUNED", tiles.TUNED)
    monkeypatch.setattr(tuned, "version", lambda name: "9.9.9")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "awq").mkdir(mode=0o700)
    tuned.use_file_for.cache_clear()
    choose.cache_clear()
    yield tmp_path / "awq"
    tuned.use_file_for.cache_clear()
    choose.cache_clear()


# -- the search -------------------------------------------------------------------------------------------------------


def test_the_fastest_form_and_then_the_fastest_split():
    asked = []
    times = {Tile(128, 8, 8, 4, 4): 9.0, Tile(64, 8, 8, 2, 3): 8.0, Tile(64, 8, 16, 2, 3): 7.0}
    best, seconds, before = search(DEFAULT, SHAPE, 132, 4, lambda tile: asked.append(tile) or times.get(tile, 10.0))
    assert (best, seconds, before) == (Tile(64, 8, 16, 2, 3), 7.0, 9.0)
    assert len(asked) == len(set(asked)), "a tile was timed twice"
    assert {(tile.rows, tile.warps) for tile in asked} == set(FORMS)
    assert all(tile.tokens == 8 and 1 <= tile.split <= 16 for tile in asked)


def test_less_than_the_noise_changes_nothing():
    faster = Tile(64, 8, 8, 2, 4)
    assert search(DEFAULT, SHAPE, 132, 4, lambda tile: 0.99 if tile == faster else 1.0)[:2] == (DEFAULT, 1.0)
    assert search(DEFAULT, SHAPE, 132, 4, lambda tile: 0.97 if tile == faster else 1.0)[:2] == (faster, 0.97)


def test_what_does_not_run_is_never_best():
    only = Tile(64, 8, 8, 4, 3)
    best, seconds, _ = search(DEFAULT, SHAPE, 132, 4, lambda tile: 2.0 if tile in (only, DEFAULT) else math.inf)
    assert (best, seconds) == (DEFAULT, 2.0)


def test_a_short_row_is_not_split_beyond_its_blocks():
    shape, asked = Shape(64, 256, 128), []
    default = choose_default("sm_90", 132, 64, 256, 128, 1)
    search(default, shape, 132, 4, lambda tile: asked.append(tile) or 1.0 / tile.split)
    assert max(tile.split for tile in asked) == 2


def test_every_bucket_is_tuned_and_a_wrong_default_is_an_error(monkeypatch):
    monkeypatch.setattr(tune, "device_class", lambda device: ("sm_90", 132))
    monkeypatch.setattr(tune, "measurer", lambda weight, shape, tokens, dtype, timer: lambda tile: timer(tile) * tokens)
    found = tune.tune(Shape(128, 256, 64), torch.float16, torch.device("cpu"), lambda tile: tile.stages)
    assert [one.key for one in found] == [("sm_90", torch.float16, 128, 256, 64, n) for n in (8, 16, 32, 64)]
    assert all(one.seconds <= one.default_seconds for one in found)
    assert [one.tile.stages for one in found] == [3, 3, 3, 3]
    with pytest.raises(NumericsError, match="128 x 256 for 8 tokens in float16"):
        tune.tune(Shape(128, 256, 64), torch.float16, torch.device("cpu"), lambda tile: math.inf)


@pytest.mark.parametrize("shape", [Shape(72, 160, 32), Shape(64, 256, 128), Shape(128, 96, 0)])
def test_a_random_weight_has_the_shape_asked_for(shape):
    weight = tune.random_weight(shape, torch.float16, torch.device("cpu"))
    assert weight.out_features == shape.outputs and weight.group == shape.group
    assert weight.tiles.shape[1] == -(-shape.inputs // 128) and int(weight.zeros.max()) <= 15


# -- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_used(own_table):
    path = tuned.path_for("NVIDIA H200 (SXM)")
    assert path == own_table / "tiles-nvidia-h200-sxm-9.9.9.json"
    assert choose("sm_90", 132, torch.bfloat16, 4096, 4096, 128, 1) == DEFAULT
    tuned.write(path, {KEY: BEST})
    assert choose("sm_90", 132, torch.bfloat16, 4096, 4096, 128, 1) == BEST, "at once"
    other = (*KEY[:5], 16)
    tuned.write(path, {other: Tile(64, 16, 1, 2, 4)})
    assert tuned.read(path) == {KEY: BEST, other: Tile(64, 16, 1, 2, 4)}, "what was there stays"
    assert [file.name for file in own_table.iterdir()] == [path.name], "nothing half-written is left"


def test_loading_a_model_reads_the_file_once(monkeypatch):
    tuned.write(tuned.path_for("NVIDIA X"), {KEY: BEST})
    tiles.TUNED.clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    reads = []
    monkeypatch.setattr(tuned, "read", lambda path, real=tuned.read: reads.append(path) or real(path))
    assert [tuned.use_file_for(torch.device("cuda", 0)) for _ in range(3)] == [1, 1, 1] and len(reads) == 1
    assert tiles.TUNED == {KEY: BEST}
    assert tuned.use_file_for(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert tuned.describe() == "tiles tuned by awq tune: 1"


def test_without_a_file_the_shipped_table_holds(monkeypatch, capsys):
    assert tuned.read(tuned.path_for("NVIDIA X")) == {} and not capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuned.describe() == "tiles not tuned"


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry["tile"].update(rows=96),
        lambda entry: entry["tile"].update(split=1000),
        lambda entry: entry["tile"].update(warps="many"),
        lambda entry: entry["tile"].update(tokens=16),
        lambda entry: entry.update(dtype="float64"),
        lambda entry: entry.update(device="sm_1"),
        lambda entry: entry.pop("outputs"),
        lambda entry: entry.update(tile=None),
    ],
)
def test_an_entry_that_makes_no_sense_is_left_out(damage, capsys):
    path = tuned.path_for("NVIDIA X")
    tuned.write(path, {KEY: BEST, (*KEY[:5], 16): Tile(64, 16, 1, 2, 4)})
    entries = json.loads(path.read_text())
    damage(entries[0])
    path.write_text(json.dumps(entries))
    assert list(tuned.read(path)) == [(*KEY[:5], 16)]
    assert "run awq tune again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\udc80".encode("utf-8", "surrogateescape")])
def test_a_broken_file_is_one_line(text, capsys):
    path = tuned.path_for("NVIDIA X")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert tuned.read(path) == {} and capsys.readouterr().err.count("\n") == 1


def test_a_split_that_was_tuned_for_one_block_of_tokens_is_not_used_for_many():
    """There are only so many counters: with more blocks of tokens, fewer programs share one."""
    tuned.use({(*KEY[:5], 64): Tile(64, 64, 16, 4, 3)})
    assert choose("sm_90", 132, torch.bfloat16, 4096, 4096, 128, 64).split == 16
    shipped = choose_default("sm_90", 132, 4096, 4096, 128, 250)
    assert choose("sm_90", 132, torch.bfloat16, 4096, 4096, 128, 250).split == shipped.split < 16


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli, ["tune", *arguments])


def test_without_a_gpu_one_line_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("--shape", "4096,4096")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "this torch sees none" in result.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = run("--shape", "4096,4096", "--device", "cpu")
    assert result.exit_code == 2 and "tiles are of GPUs" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to tune for"),
        (("--shape", "12"), "not two numbers"),
        (("--shape", "12,128"), "multiple of 8"),
        (("--shape", "64,128", "--group-size", "48"), "group size 48"),
    ],
)
def test_what_cannot_be_tuned_is_a_usage_error(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2 and words in result.stderr


@pytest.fixture
def made_up_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("awq_core.devices.pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(command, "device_name", lambda device: "NVIDIA X")
    asked = []

    def made(shape, dtype, device, timer):
        asked.append((shape, dtype))
        return [Best(("sm_90", dtype, shape.outputs, shape.inputs, shape.group, 8), BEST, 1e-5, 2e-5)]

    monkeypatch.setattr(tune, "tune", made)
    return asked


def test_shapes_are_timed_and_kept(made_up_gpu):
    result = run("--shape", "4096,4096", "--shape", "64,128", "--shape", "4096,4096", "--group-size", "-1")
    assert result.exit_code == 0, result.output
    assert made_up_gpu == [(Shape(4096, 4096, 0), torch.bfloat16), (Shape(64, 128, 0), torch.bfloat16)]
    assert "20.0" in result.stdout and "10.0" in result.stdout and "tiles-nvidia-x-9.9.9.json" in result.stdout
    assert len(tuned.read(tuned.path_for("NVIDIA X"))) == 2
    data = json.loads(run("--shape", "64,128", "--json").stdout)
    assert data["tiles"][0]["tile"]["rows"] == 64 and data["tiles"][0]["group_size"] == 128


def test_a_models_own_shapes(made_up_gpu, monkeypatch, make):
    from awq_core.runtime.linear import QuantLinear

    sizes = ((64, 16, 32), (96, 16, -1), (64, 16, 32))
    linears = [QuantLinear(make(*size).packed, None, torch.float16) for size in sizes]
    asked = []
    monkeypatch.setattr(
        "awq_core.load", lambda folder, **options: asked.append(options) or torch.nn.Sequential(*linears), raising=False
    )
    result = run(".", "--fuse", "--json")
    assert result.exit_code == 0, result.output
    assert made_up_gpu == [(Shape(16, 64, 32), torch.float16), (Shape(16, 96, 0), torch.float16)]
    assert asked == [{"device": "cuda", "fuse": True}]
    linears.clear()
    assert "no linear is quantized" in run(".").stderr
