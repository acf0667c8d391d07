"""Kill it at any moment, nothing is lost: the bytes after any number of kills are those of an uninterrupted run."""

import subprocess
import sys

import pytest
import torch

import awq_core
from awq_core import QuantConfig
from awq_core.api import Phase
from awq_core.errors import OutputError

KILLS = 25
SETTINGS = {"config": QuantConfig(group_size=32), "samples": 4, "seq_len": 32}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One process imports torch once and forks a child for every attempt, so that kills land in the work, not in imports.
DRIVER = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import awq_core
from awq_core import QuantConfig
from pathlib import Path

CONFIG = QuantConfig(group_size=32, lm_head=sys.argv[5] == "head")
source, folder, kills, corpus = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])

def child(out):
    pid = os.fork()
    if pid == 0:
        try:
            awq_core.quantize(source, out, config=CONFIG, calibration=corpus, samples=4, seq_len=32)
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid

# Here, not in a child: whatever is imported on first use is then there for all of them.
awq_core.quantize(source, folder / "whole", config=CONFIG, calibration=corpus, samples=4, seq_len=32)
started = time.perf_counter()
assert os.waitpid(child(folder / "timed"), 0)[1] == 0
length = time.perf_counter() - started
chance = random.Random(0)
done, runs = 0, 0
while done < kills:
    out = folder / f"killed-{runs}"
    while True:
        pid = child(out)
        # Late moments are favoured: they lie in the last shard, the index and the moves.
        deadline = time.perf_counter() + length * chance.choice((chance.random(), chance.uniform(0.6, 1.0)))
        status = None
        while time.perf_counter() < deadline and status is None:
            found, code = os.waitpid(pid, os.WNOHANG)
            status = code if found else None
            time.sleep(0.001)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
        if status == signal.SIGKILL:
            done += 1
            continue
        # A run killed after its last act has left a finished folder, which the next one refuses to touch.
        assert status == 0 or (out / "config.json").exists(), status
        break
    runs += 1
print(done, runs)
"""


@pytest.mark.parametrize("kind", ["dense", "mixture", "head"])
def test_killed_at_random_moments_every_byte_is_the_same(request, tmp_path, corpus, kind):
    source = request.getfixturevalue("llama_source")
    if kind == "mixture":
        from transformers import MixtralConfig

        from awq_core.testing.tiny import save_tiny

        source = tmp_path / "source"
        tiny = request.getfixturevalue("tiny_options")
        save_tiny(MixtralConfig(**tiny, num_local_experts=3, num_experts_per_tok=1), source)
    kills = KILLS if kind == "dense" else 8
    command = [sys.executable, "-c", DRIVER, str(source), str(tmp_path), str(kills), repr(list(corpus)), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    killed, runs = map(int, done.stdout.split()[-2:])
    assert killed >= kills and runs >= 1
    whole = contents(tmp_path / "whole")
    for run in range(runs):
        assert contents(tmp_path / f"killed-{run}") == whole


class StopHere(Exception):
    pass


def stop_after(blocks):
    """A progress callback that raises once so many blocks are done, and notes what it was told."""
    told = []

    def progress(event):
        told.append(event)
        if getattr(event, "done", 0) >= blocks:
            raise StopHere

    return progress, told


def test_a_run_that_stopped_goes_on_where_it_was(llama_source, tmp_path, corpus):
    whole = awq_core.quantize(llama_source, tmp_path / "whole", calibration=list(corpus), **SETTINGS)
    progress, _ = stop_after(1)
    with pytest.raises(StopHere):
        awq_core.quantize(llama_source, tmp_path / "out", calibration=list(corpus), progress=progress, **SETTINGS)
    assert not (tmp_path / "out" / "config.json").exists()
    told = []
    again = awq_core.quantize(
        llama_source, tmp_path / "out", calibration=list(corpus), progress=told.append, **SETTINGS
    )
    assert any(isinstance(event, Phase) and "resuming: 1 finished" in event.text for event in told)
    assert again.reports == whole.reports
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"config": QuantConfig(group_size=32, clip="none")}, r"config\.clip"),
        ({"seq_len": 16}, "calibration"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_arguments_are_refused_with_the_difference_named(llama_source, tmp_path, corpus, changed, named):
    progress, _ = stop_after(1)
    with pytest.raises(StopHere):
        awq_core.quantize(llama_source, tmp_path / "out", calibration=list(corpus), progress=progress, **SETTINGS)
    with pytest.raises(OutputError, match=named) as caught:
        awq_core.quantize(llama_source, tmp_path / "out", calibration=list(corpus), **{**SETTINGS, **changed})
    assert "--restart" in str(caught.value) and "\n" not in str(caught.value)
    awq_core.quantize(llama_source, tmp_path / "out", calibration=list(corpus), restart=True, **{**SETTINGS, **changed})
    assert (tmp_path / "out" / "config.json").exists()


def test_another_source_is_refused(llama_source, model_folder, tmp_path, corpus):
    from safetensors.torch import load_file, save_file

    progress, _ = stop_after(1)
    with pytest.raises(StopHere):
        awq_core.quantize(llama_source, tmp_path / "out", calibration=list(corpus), progress=progress, **SETTINGS)
    tensors = load_file(model_folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="source"):
        awq_core.quantize(model_folder, tmp_path / "out", calibration=list(corpus), **SETTINGS)


def test_a_shorter_dtype_on_disk_than_in_memory_resumes_to_the_same_bytes(request, tmp_path, corpus):
    """Norms are worked in fp32 here and stored in bf16; what a resumed run reads back must be what was in memory."""
    from transformers import LlamaConfig

    from awq_core.testing.tiny import save_tiny

    source = tmp_path / "source"
    save_tiny(LlamaConfig.from_pretrained(request.getfixturevalue("llama_source")), source, dtype=torch.bfloat16)
    options = {**SETTINGS, "dtype": "float32", "calibration": list(corpus)}
    awq_core.quantize(source, tmp_path / "whole", **options)
    progress, _ = stop_after(1)
    with pytest.raises(StopHere):
        awq_core.quantize(source, tmp_path / "out", progress=progress, **options)
    awq_core.quantize(source, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
