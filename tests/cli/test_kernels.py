"""`awq kernels`: every backend, whether it runs here, and why not."""

import json

import pytest

from awq_core import kernels
from awq_core.hooks import KernelBackend
from awq_core.kernels.cpu import build
from awq_core.kernels.survey import survey

WITHOUT = "no C++ compiler: install g++"


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(build, "library", lambda: WITHOUT)


def lines(text):
    return {line.split()[0]: line for line in text.splitlines()}


def test_each_is_listed_with_the_reason(awq, no_library):
    listed = lines(awq("kernels").stdout)
    assert list(listed) == ["kernel", "cpu", "int4pack", "reference", "triton"]
    assert listed["cpu"].split()[1:5] == ["cpu", "no", "no", "no"] and listed["cpu"].endswith(f"  {WITHOUT}")
    assert listed["int4pack"].split()[1:5] == ["cpu", "chosen", "no", "no"]
    assert listed["int4pack"].count("float16 activations") == 1, "not said twice"
    assert listed["reference"].split()[1:] == ["cpu", "yes", "chosen", "chosen"]


def test_a_kernel_that_runs_says_what_it_is(awq):
    if isinstance(build.library(), str):
        pytest.skip(f"no C++ kernel here: {build.library()}")
    line = lines(awq("kernels").stdout)["cpu"]
    assert line.split()[1:5] == ["cpu", "chosen", "chosen", "chosen"]
    assert "AVX512-BF16" in line and str(build.library().path) in line


def test_the_same_as_json(awq, no_library):
    document = json.loads(awq("kernels", "--json").stdout)
    found = {one["name"]: one for one in document["kernels"]}
    assert document["forced"] is None
    assert found["cpu"]["reasons"] == dict.fromkeys(("bfloat16", "float16", "float32"), WITHOUT)
    assert found["int4pack"]["chosen"] == ["bfloat16"] and found["int4pack"]["reasons"]["bfloat16"] == ""
    assert found["reference"]["chosen"] == ["float16", "float32"]


def test_the_forced_one_is_the_chosen_one(awq, monkeypatch, no_library):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    done = awq("kernels")
    listed = lines(done.stdout)
    assert listed["reference"].split()[2:5] == ["chosen"] * 3 and "chosen" not in listed["int4pack"]
    assert "AWQ_KERNEL=reference" in done.stderr
    monkeypatch.setenv("AWQ_KERNEL", "int4pack")
    assert lines(awq("kernels").stdout)["int4pack"].split()[2:5] == ["chosen", "no", "no"]
    assert "chosen" not in lines(awq("kernels").stdout)["reference"]


def test_a_device_that_is_not_here_is_the_reason():
    (found,) = survey(
        (KernelBackend(name="far", formats=("gemm",), devices=("tpu",), factory="nowhere:Far"),), ("cpu",)
    )
    assert found.device == "" and set(found.reasons.values()) == {"runs on tpu; not found here"} and not found.chosen


def test_one_that_breaks_is_listed_with_its_error(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_MADE", {})
    broken = KernelBackend(
        name="broken", formats=("gemm",), devices=("cpu",), factory="awq_nowhere:Kernel", priority=99
    )
    first, *_ = survey((*kernels.KERNEL_BACKENDS, broken), ("cpu",))
    assert first.name == "broken" and "ModuleNotFoundError" in first.reasons["bfloat16"] and first.detail == ""
    assert "awq_nowhere" in capsys.readouterr().err
