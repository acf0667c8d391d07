"""Memory of the process, as progress shows it."""

import builtins
import resource

import pytest
import torch

from awq_core import devices


def test_resident_memory_grows_and_shrinks_with_what_is_held():
    before = devices.resident_bytes()
    held = torch.ones(64 << 18)  # 64 MiB, every page touched
    during = devices.resident_bytes()
    assert 60 << 20 < during - before < 100 << 20
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert during < most + (10 << 20)  # what is only reserved, and not in RAM, is not counted
    del held
    devices.release_freed_memory()
    assert devices.resident_bytes() < during - (30 << 20)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_proc_it_is_the_most_there_ever_was(monkeypatch, platform, unit):
    def refuse(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(devices.sys, "platform", platform)
    assert devices.resident_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def test_a_gpu_adds_the_most_it_held(monkeypatch):
    monkeypatch.setattr(devices, "resident_bytes", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 200 + device.index)
    assert devices.memory_bytes(torch.device("cpu")) == 1000
    assert devices.memory_bytes(torch.device("cuda:1")) == 1201
