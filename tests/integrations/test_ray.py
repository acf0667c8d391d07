"""Work spread over a Ray cluster: every byte as without one, whoever is killed."""

import os
import signal
import subprocess
import sys

import pytest
import torch

import awq_core
from awq_core import QuantConfig
from awq_core.api import Phase
from awq_core.errors import ConfigError, NumericsError
from awq_core.integrations import ray as integration
from awq_core.quantization.linear import Pending
from awq_core.testing.tiny import save_tiny

ray = pytest.importorskip("ray")

CPU = torch.device("cpu")
SETTINGS = {"config": QuantConfig(group_size=32), "samples": 4, "seq_len": 32}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    """A cluster of this machine alone, on loopback; its address."""
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, object_store_memory=100 << 20, _node_ip_address="127.0.0.1", **options)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def mixture_source(tmp_path_factory, tiny_options):
    from transformers import MixtralConfig

    folder = tmp_path_factory.mktemp("mixture")
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=3, num_experts_per_tok=1), folder)
    return folder


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, llama_source, mixture_source, corpus):
    """By source: the source, and what the local engine makes of it."""
    found = {}
    for name, source in (("dense", llama_source), ("mixture", mixture_source)):
        out = tmp_path_factory.mktemp("whole") / name
        awq_core.quantize(source, out, calibration=list(corpus), **SETTINGS)
        found[name] = source, contents(out)
    return found


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_the_bytes_are_those_of_the_local_engine(wholes, tmp_path, corpus, kind):
    source, whole = wholes[kind]
    told = []
    awq_core.quantize(
        source, tmp_path / "out", calibration=list(corpus), engine="ray", progress=told.append, **SETTINGS
    )
    assert contents(tmp_path / "out") == whole
    assert sum(hasattr(event, "memory_bytes") for event in told) == 2  # progress, block by block


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_shards_are_worked_in_workers_and_the_bytes_are_those_of_the_local_engine(
    wholes, tmp_path, corpus, kind, monkeypatch
):
    """A worker is killed in the middle of a shard, too."""
    source, _ = wholes[kind]
    tickets, original = tmp_path / "tickets", integration._work
    tickets.mkdir()
    folder, killed = str(tickets), str(tmp_path / "killed")

    def work(driver, threads, device, function, value, *arrays):
        if function.__name__ == "work":
            number = len(os.listdir(folder))
            open(os.path.join(folder, f"{number}-{value.function.__name__}-{os.getpid()}"), "x").close()
            if number >= 4 and not os.path.exists(killed):
                os.mkdir(killed)
                os.kill(os.getpid(), signal.SIGKILL)
        return original(driver, threads, device, function, value, *arrays)

    monkeypatch.setattr(integration, "_work", work)
    settings = {**SETTINGS, "samples": 40, "seq_len": 16, "calibration": list(corpus), "calib_shards": 3}
    awq_core.quantize(source, tmp_path / "local", **settings)
    assert not list(tickets.iterdir())
    awq_core.quantize(source, tmp_path / "ray", engine="ray", **settings)
    assert os.path.exists(killed)
    done = [name.name.split("-") for name in tickets.iterdir()]
    assert {inner for _, inner, _ in done} == {"apart", "observe", "_forward"}
    assert all(int(process) != os.getpid() for *_, process in done)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")


def test_workers_killed_while_they_work_change_nothing(wholes, tmp_path, corpus, monkeypatch):
    source, whole = wholes["mixture"]
    tickets, original = tmp_path / "tickets", integration._work
    tickets.mkdir()
    folder, fatal = str(tickets), (1, 9, 30)

    def work(*arguments):
        number = 0
        while True:
            try:
                os.mkdir(os.path.join(folder, str(number)))
                break
            except FileExistsError:
                number += 1
        if number in fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    monkeypatch.setattr(integration, "_work", work)
    awq_core.quantize(source, tmp_path / "out", calibration=list(corpus), engine="ray", **SETTINGS)
    assert len(list(tickets.iterdir())) > max(fatal)
    assert contents(tmp_path / "out") == whole


DRIVER = """
import os, signal, sys
import awq_core
from awq_core import QuantConfig
from awq_core.integrations import ray as integration

in_order, calls = integration.in_order, []

def dying(submit, items, *, ahead):
    calls.append(1)
    for result in in_order(submit, items, ahead=ahead):
        if len(calls) == 6:  # four for the first block; in the second, while candidates are scored
            os.kill(os.getpid(), signal.SIGKILL)
        yield result

integration.in_order = dying
source, out, address, corpus = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
config = QuantConfig(group_size=32)
awq_core.quantize(
    source, out, config=config, calibration=corpus, samples=4, seq_len=32, engine="ray", address=address
)
"""


def test_a_driver_that_was_killed_is_resumed(wholes, tmp_path, corpus, two_workers):
    source, whole = wholes["dense"]
    out = tmp_path / "out"
    command = [sys.executable, "-c", DRIVER, str(source), str(out), two_workers, repr(list(corpus))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    told = []
    awq_core.quantize(source, out, calibration=list(corpus), engine="ray", progress=told.append, **SETTINGS)
    assert any(isinstance(event, Phase) and "resuming: 1 finished" in event.text for event in told)
    assert contents(out) == whole


def test_tensors_arrive_as_they_were_and_are_a_tasks_own():
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(128, 256, generator=generator)  # 128 KiB: goes through the object store, once
    small = torch.randn(8, 24, generator=generator).bfloat16().T
    empty = torch.zeros(0, 4, dtype=torch.int32)

    def spoil(item):
        copy = Pending(item.original.clone(), item.step.clone(), item.columns)
        item.original.zero_()
        return copy

    items = [Pending(large, small, empty)] * 6
    with integration.cluster(None, CPU) as spread:
        found = list(spread(spoil, items))
    assert len(found) == 6
    for one in found:
        for before, after in ((large, one.original), (small, one.step), (empty, one.columns)):
            assert after.dtype == before.dtype and torch.equal(after, before)
    assert ray.is_initialized()  # it was open before, and stays so


def test_an_error_in_a_task_is_the_error_of_the_run():
    def fail(item):
        raise NumericsError(f"item {item}", hint="look")

    with integration.cluster(None, CPU) as spread, pytest.raises(NumericsError) as caught:
        list(spread(fail, [0]))
    assert str(caught.value) == "item 0 (look)" and caught.value.hint == "look"


def test_a_worker_that_computes_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(integration, "arithmetic", lambda device: "awq_core 9, torch 9, abacus")
    with integration.cluster(None, CPU) as spread, pytest.raises(ConfigError, match="abacus"):
        list(spread(Pending, [torch.ones(1)]))


def test_what_ray_lacks_is_said_in_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="no machine of the Ray cluster has a GPU"):
        integration.cluster(None, torch.device("cuda")).__enter__()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("smoke://signals", "127.0.0.1:1"):
        with pytest.raises(ConfigError, match=f"no Ray cluster at '{address}'") as caught:
            integration.cluster(address, CPU).__enter__()
        assert caught.value.hint and "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"awq-core\[ray\]"):
        integration.cluster(None, CPU).__enter__()
