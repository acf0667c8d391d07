"""Bad input fails in one line that names the place, with the right exit code, and leaves nothing that looks finished.

Every case goes through `awq_core.quantize`; a few also through the program, where the line and the code are seen.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import awq_core
from awq_core import QuantConfig
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import (
    AwqError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    NumericsError,
    OutputError,
    PlanError,
    UnsupportedModelError,
)
from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl
from awq_core.hooks.manager import PluginManager
from awq_core.runtime.load import load

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
NEAREST = QuantConfig(group_size=32, scale=False, clip="none")


@pytest.fixture
def quantize(tmp_path, corpus):
    """quantize(folder, calibration=...): with settings that are quick, into `tmp_path / "out"`."""

    def run(folder, out="out", **options):
        settings = {"config": QuantConfig(group_size=32), "calibration": corpus, "samples": 4, "seq_len": 32}
        return awq_core.quantize(folder, tmp_path / out, **{**settings, **options})

    return run


@pytest.fixture
def fails(quantize, tmp_path, one_line):
    """fails(CheckpointError, folder, words=(...)): it does, in one line, and leaves nothing that passes for a model."""

    def check(kind, folder, *, words=(), code=1, **options):
        with pytest.raises(AwqError) as caught:
            quantize(folder, **options)
        assert type(caught.value) is kind
        one_line(caught.value, *words)
        assert caught.value.exit_code == code
        assert nothing_finished(tmp_path / "out")
        return caught.value

    return check


def nothing_finished(out):
    """At most a hidden folder is there, with finished work to go on with."""
    return not out.exists() or all(path.name.startswith(".awq-") for path in out.iterdir())


def change(folder, edit):
    """Rewrite the weights of a folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.fixture
def sharded(model_folder):
    """The model in two shards and an index."""
    tensors = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:8], "model-00002-of-00002.safetensors": names[8:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, model_folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (model_folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return model_folder


# -- files of the model -----------------------------------------------------------------------------------------------


def test_a_sharded_model_is_fine(sharded, quantize):
    """The control: each failure below is the damage's."""
    assert len(quantize(sharded).reports) == 14


def test_a_missing_shard(sharded, fails):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    fails(CheckpointError, sharded, words=(sharded, "model-00002-of-00002.safetensors", "missing"))


@pytest.mark.parametrize("size", [0, 4, 200, -8])
def test_a_truncated_shard(sharded, fails, size):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    fails(CheckpointError, sharded, words=(path.name, "truncated or corrupt"))


@pytest.mark.parametrize("place", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", 7])
def test_an_index_that_points_elsewhere(sharded, tmp_path, fails, place):
    save_file({UP: torch.zeros(96, 64)}, tmp_path / "elsewhere.safetensors")
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][UP] = place
    (sharded / INDEX).write_text(json.dumps(index))
    fails(CheckpointError, sharded, words=(INDEX, UP, "plain"))


def test_an_index_that_is_not_json(sharded, fails):
    (sharded / INDEX).write_text('{"weight_map": {')
    fails(CheckpointError, sharded, words=(INDEX,))


def test_a_folder_without_weights(model_folder, fails):
    (model_folder / "model.safetensors").unlink()
    fails(CheckpointError, model_folder, words=(model_folder, "no .safetensors file"))


def test_pickled_weights(model_folder, fails):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    fails(CheckpointError, model_folder, words=(model_folder, "pickled weights"))


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b"[]"])
def test_a_bad_config_json(model_folder, fails, content):
    path = model_folder / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    fails(CheckpointError, model_folder, words=("config.json",))


def test_no_folder_at_all(tmp_path, fails):
    fails(CheckpointError, tmp_path / "absent", words=("absent", "no such model folder"))


# -- tensors ----------------------------------------------------------------------------------------------------------

EVERY_PLACE = [UP, "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("config", [NEAREST, QuantConfig(group_size=32)], ids=["nearest", "calibrated"])
@pytest.mark.parametrize("name", EVERY_PLACE)
def test_a_weight_of_the_wrong_dtype(model_folder, fails, name, config):
    change(model_folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    fails(CheckpointError, model_folder, words=(name, "int8"), config=config)


@pytest.mark.parametrize("name", EVERY_PLACE)
def test_a_weight_of_the_wrong_shape(model_folder, fails, name, monkeypatch):
    """Found before the first block is worked, wherever in the model it is."""
    monkeypatch.setattr(awq_core.quantization.engine, "quantize_block", lambda *args: pytest.fail("work was begun"))
    change(model_folder, lambda tensors: tensors.update({name: tensors[name][..., :32].contiguous()}))
    fails(CheckpointError, model_folder, words=(name, "has shape", "configuration says"))


def test_a_configuration_of_another_model(model_folder, fails):
    change_config(model_folder, intermediate_size=128)
    fails(CheckpointError, model_folder, words=("mlp", "(96, 64)", "(128, 64)"))


def test_a_block_without_one_of_its_tensors(model_folder, fails, monkeypatch):
    monkeypatch.setattr(awq_core.quantization.engine, "quantize_block", lambda *args: pytest.fail("work was begun"))
    change(model_folder, lambda tensors: tensors.pop(UP))
    fails(CheckpointError, model_folder, words=(model_folder, "no tensor", UP))


def test_more_layers_than_weights(model_folder, fails):
    change_config(model_folder, num_hidden_layers=3)
    fails(CheckpointError, model_folder, words=(model_folder, "model.layers.2."))


@pytest.mark.parametrize("config", [NEAREST, QuantConfig(group_size=32)], ids=["nearest", "calibrated"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", EVERY_PLACE)
def test_nan_and_inf_in_a_weight(model_folder, fails, name, value, config):
    change(model_folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    fails(NumericsError, model_folder, words=(name, "NaN or inf"), config=config)


@pytest.mark.parametrize("layer", [0, 1])
def test_activations_that_overflow(model_folder, fails, layer):
    """Finite weights whose product is not: gate times up overflows, and down_proj reads it."""
    prefix = f"model.layers.{layer}.mlp"

    def grow(tensors):
        for name in ("gate", "up"):
            tensors[f"{prefix}.{name}_proj.weight"].mul_(1e25)

    change(model_folder, grow)
    fails(NumericsError, model_folder, words=(f"{prefix}.down_proj", "NaN or inf", "calibration"))


def test_activations_that_overflow_in_half_precision_only(model_folder, fails, quantize):
    def grow(tensors):
        for name in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"].mul_(300)

    change(model_folder, grow)
    error = fails(NumericsError, model_folder, words=("model.layers.0.mlp.down_proj",), dtype="float16")
    assert "float32" in error.hint
    assert quantize(model_folder, "another", dtype="float32").reports


def test_a_weight_too_large_for_the_dtype_asked_for(model_folder, fails):
    change(model_folder, lambda tensors: tensors[UP].mul_(1e6))
    fails(NumericsError, model_folder, words=(UP, "float16"), dtype="float16")


def test_scales_that_overflow(model_folder, fails):
    """Weights of 1e7 have steps that fp16 cannot hold."""
    change(model_folder, lambda tensors: tensors[UP].mul_(1e7))
    fails(NumericsError, model_folder, words=("model.layers.1.mlp.up_proj", "NaN or inf", "float16"), config=NEAREST)


def test_a_group_size_that_does_not_divide_is_no_error(model_folder, quantize, tmp_path):
    result = quantize(model_folder, config=QuantConfig(group_size=64))
    kept = {linear.name: linear.reason for linear in result.plan.linears if "down_proj" in linear.name}
    assert set(kept.values()) == {"group size 64 does not divide its 96 inputs"}
    assert "model.layers.0.mlp.down_proj.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert load(tmp_path / "out")
    assert "64 does not divide" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("changes", [{"group_size": 48}, {"bits": 3}, {"rounding": "up"}, {"clip": "x"}])
def test_settings_that_cannot_be_are_refused_before_anything(changes, one_line):
    with pytest.raises(ConfigError) as caught:
        QuantConfig(**changes)
    (name, value), *_ = changes.items()
    one_line(caught.value, name, value)
    assert caught.value.exit_code == 2


# -- calibration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no text"),
        (b" \n\t\n", "holds no text"),
        (b"too short", "one sample needs 32"),
        (b"good text\n" * 40 + b"\xe9t\xe9\n", "is not UTF-8: byte 400"),
        (None, "no such file or folder of text"),
    ],
)
def test_a_calibration_file_that_is_no_use(model_folder, tmp_path, fails, content, words):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    fails(CalibrationError, model_folder, words=("corpus.txt", words), calibration=path)
    fails(CalibrationError, model_folder, words=("corpus.txt", words), calibration=str(path))


def test_a_bad_line_of_json(model_folder, tmp_path, fails):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n')
    fails(CalibrationError, model_folder, words=("corpus.jsonl line 2",), calibration=path)


def test_a_calibration_folder_without_text(model_folder, tmp_path, fails):
    (tmp_path / "texts").mkdir()
    fails(CalibrationError, model_folder, words=("texts",), calibration=tmp_path / "texts")


def test_tokens_of_another_model(model_folder, fails):
    fails(CalibrationError, model_folder, words=("token id 4000", "128 tokens"), calibration=[[4000] * 64])


@pytest.mark.parametrize("field", ["samples", "seq_len"])
def test_counts_that_cannot_be(model_folder, fails, field):
    fails(ConfigError, model_folder, words=(f"{field}=0",), code=2, **{field: 0})


def test_a_missing_tokenizer(model_folder, fails, quantize):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model_folder / name).unlink()
    error = fails(CalibrationError, model_folder, words=(model_folder, "tokenizer"))
    assert "tokenizer=" in error.hint
    assert quantize(model_folder, "another", config=NEAREST).plan, "round-to-nearest reads no text"


# -- where it is written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "model.safetensors", ".hidden"])
def test_a_folder_that_is_not_empty(model_folder, quantize, tmp_path, one_line, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError) as caught:
        quantize(model_folder)
    one_line(caught.value, tmp_path / "out", "not empty", name)
    assert [(path.name, path.read_text()) for path in (tmp_path / "out").iterdir()] == [(name, "mine")]


def test_writing_into_the_model_itself(model_folder, one_line):
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    with pytest.raises(OutputError) as caught:
        awq_core.quantize(model_folder, model_folder, config=NEAREST)
    one_line(caught.value, model_folder, "not empty")
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_a_file_where_the_folder_should_be(model_folder, quantize, tmp_path, one_line):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError) as caught:
        quantize(model_folder)
    one_line(caught.value, tmp_path / "out", "not a folder")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_full_disk(model_folder, fails, tmp_path, monkeypatch, written):
    """Whichever file it is that no longer fits."""
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    fails(OutputError, model_folder, words=(tmp_path / "out", "disk full"))
    assert len(calls) > written


def test_a_disk_that_fills_while_the_small_files_are_copied(model_folder, fails, tmp_path, monkeypatch):
    """All weights are written by then; without config.json they are no model."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    fails(OutputError, model_folder, words=(tmp_path / "out", "disk full"))


def test_two_runs_into_one_folder(model_folder, quantize, tmp_path, one_line):
    out = tmp_path / "out"
    with CheckpointWriter(out) as first:
        with pytest.raises(OutputError) as caught:
            quantize(model_folder)
        one_line(caught.value, out, "another run")
        first.add("x", torch.zeros(1))
        first.finish({"config.json": "{}"})
    assert (out / "config.json").read_text() == "{}", "the first run is not disturbed"


def test_two_runs_at_the_same_moment(model_folder, quantize, tmp_path):
    """One of them wins and is whole; every other one says why not."""
    outcomes = []

    def run():
        try:
            outcomes.append(quantize(model_folder, config=NEAREST))
        except OutputError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = [outcome for outcome in outcomes if isinstance(outcome, OutputError)]
    assert len(outcomes) == 3 and len(failed) == 2
    assert load(tmp_path / "out")


def test_an_interrupted_run_is_no_model(model_folder, quantize, tmp_path):
    def stop(event):
        if hasattr(event, "path"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model_folder, progress=stop)
    assert nothing_finished(tmp_path / "out")


# -- models and machines ----------------------------------------------------------------------------------------------


def test_a_model_that_needs_its_own_code(model_folder, fails):
    change_config(
        model_folder, model_type="acorn", architectures=["AcornModel"], auto_map={"AutoConfig": "acorn.AcornConfig"}
    )
    stack = LayerStack(component="language", blocks="model.layers")
    arch = Architecture(family="acorn", model_types=("acorn",), stacks=(stack,))
    words = (model_folder, "own Python code", "--trust-remote-code")
    fails(ConfigError, model_folder, words=words, code=2, manager=manager_of(arch))


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
    ],
)
def test_a_model_that_is_quantized_already(model_folder, fails, section, method):
    change_config(model_folder, quantization_config=section)
    fails(CheckpointError, model_folder, words=(model_folder, "already quantized", method))


def test_its_own_output_is_quantized_already(quantized_llama, fails):
    fails(CheckpointError, quantized_llama, words=(quantized_llama, "already quantized"))


def test_an_empty_section_says_not_quantized(model_folder, quantize):
    change_config(model_folder, quantization_config={})
    assert quantize(model_folder, config=NEAREST).plan


@pytest.mark.parametrize(
    ("model_type", "hint"), [("falcon", "pip install awq-plugin-falcon"), ("never_heard_of", "plugin of your own")]
)
def test_a_model_nobody_claims(model_folder, fails, model_type, hint):
    change_config(model_folder, model_type=model_type, architectures=["SomeModel"])
    fails(UnsupportedModelError, model_folder, words=(f"'{model_type}'", hint), code=3, manager=manager_of())


def test_a_plugin_that_is_not_installed(model_folder, fails):
    fails(ConfigError, model_folder, words=("no plugin 'lama'", "'llama'"), code=2, plugin="lama")


def test_a_component_the_model_does_not_have(model_folder, fails):
    config = QuantConfig(group_size=32, components={"vision": "keep"})
    fails(ConfigError, model_folder, words=("'vision'", "language"), code=2, config=config)


@pytest.mark.parametrize("device", ["toaster", "meta", "mps", "cpu:x"])
def test_a_device_that_is_not_there(model_folder, fails, device):
    fails(ConfigError, model_folder, words=(f"device='{device}'",), code=2, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there(model_folder, fails):
    fails(ConfigError, model_folder, words=("device='cuda'", "no GPU"), code=2, device="cuda")


@pytest.mark.parametrize("dtype", ["int8", "floaty", torch.int32])
def test_a_dtype_that_cannot_be(model_folder, fails, dtype):
    fails(ConfigError, model_folder, words=("dtype=",), code=2, dtype=dtype)


def test_groups_that_change_the_function(model_folder, fails):
    """up_proj reads the norm too: scaling gate_proj alone is not AWQ but another model."""
    group = ScaleGroup(prev="post_attention_layernorm", layers=("mlp.gate_proj",))
    arch = Architecture(
        family="acorn",
        model_types=("llama",),
        stacks=(LayerStack(component="language", blocks="model.layers"),),
        scale_groups=(group,),
    )
    words = ("awq-plugin-acorn 1.2", "post_attention_layernorm -> mlp.gate_proj", "function")
    fails(PlanError, model_folder, words=words, code=4, manager=manager_of(arch))


def manager_of(*architectures):
    manager = PluginManager(allow=())
    if architectures:

        class Plugin:
            @hookimpl
            def awq_architectures(self):
                return architectures

        manager.register(Plugin(), "acorn", dist="awq-plugin-acorn", version="1.2")
    return manager


# -- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("truncated", 1, ["model.safetensors", "truncated or corrupt", "try:"]),
        ("unknown", 3, ["'never_heard_of'", "plugin of your own"]),
        ("group size", 2, ["group_size=48"]),
        ("not empty", 1, ["out is not empty", "mine.txt"]),
    ],
)
def test_the_program_says_one_line(model_folder, tmp_path, case, code, words):
    arguments = ["--group-size", "32", "--no-scale"]
    if case == "truncated":
        path = model_folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "unknown":
        change_config(model_folder, model_type="never_heard_of", architectures=["SomeModel"])
    elif case == "group size":
        arguments = ["--group-size", "48"]
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
    command = [sys.executable, "-m", "awq_core.cli", "quantize", str(model_folder), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_run_that_would_quantize_nothing_is_refused(model_folder, tmp_path):
    """Group size 128 divides none of this model's inputs."""
    with pytest.raises(ConfigError, match="nothing would be quantized: group size 128") as caught:
        awq_core.quantize(model_folder, tmp_path / "out", config=QuantConfig(group_size=128))
    assert caught.value.exit_code == 2 and not (tmp_path / "out" / "config.json").exists()
