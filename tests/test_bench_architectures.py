"""benchmarks/architectures.py: whatever happens to one model type is a row of the table."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "architectures.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_architectures", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_an_unknown_model_is_inferred(bench):
    row = bench.examine("stablelm", plugins=False)
    assert row.owner == "inferred" and row.proved and row.coverage > 0.9 and row.groups == 4 and row.made


def test_a_claimed_model_is_its_owners(bench):
    pytest.importorskip("awq_plugin_llama")
    row = bench.examine("llama", plugins=True)
    assert row.owner == "llama" and row.proved and row.coverage > 0.9 and row.made and not row.why


def test_a_model_that_cannot_be_made_says_why(bench, monkeypatch):
    from awq_core.errors import CheckpointError
    from awq_core.runtime import load

    def refuse(*_, **__):
        raise CheckpointError("no such tensor")

    monkeypatch.setattr(load, "load", refuse)
    row = bench.examine("stablelm", plugins=False)
    assert row.proved and not row.made and row.why.startswith("not made: no such tensor")


def test_a_model_that_does_not_build_is_a_row_with_the_reason(bench):
    row = bench.examine("vit", plugins=False)
    assert not row.proved and row.why.startswith("its default configuration does not build: ")


class Connection:
    """The parent's end of a child that died, or never answers."""

    def __init__(self, answers):
        self.answers = answers

    def poll(self, limit):
        return self.answers

    def recv(self):
        raise EOFError

    def close(self):
        pass


class Child:
    exitcode = -11

    def __init__(self, **_):
        self.killed = False

    def start(self):
        pass

    def join(self):
        pass

    kill = join


@pytest.mark.parametrize(
    ("answers", "why"), [(True, "its process ended with -11"), (False, "not done within 7 s")], ids=["crash", "wait"]
)
def test_a_crash_and_a_long_wait_are_rows(bench, monkeypatch, answers, why):
    monkeypatch.setattr(bench.CHILDREN, "Pipe", lambda duplex: (Connection(answers), Connection(answers)))
    monkeypatch.setattr(bench.CHILDREN, "Process", Child)
    row = bench.apart("acorn", plugins=False, limit=7)
    assert (row.model_type, row.why, row.proved) == ("acorn", why, False)


def test_the_table(bench):
    rows = [
        bench.Row("acorn", "inferred", 5e-7, 0.995, 3, made=True, why="mlp.*.down: a | b", seconds=1.6),
        bench.Row("hazel", "hazel", 1e-6, 1.0, 4, made=True, fused=True),
        bench.Row("walnut", why="not done within 7 s", seconds=7.0),
    ]
    text = bench.table(rows, "command")
    assert "2 of 3 are proved, 1 by plugins and 1 by inference; 2 are made." in text
    assert text.endswith(
        "| `acorn` | inferred | 5e-07 | 99.5% | 3 | yes | no | 2 | mlp.\\*.down: a / b |\n"
        "| `hazel` | hazel | 1e-06 | 100.0% | 4 | yes | yes | 0 |  |\n"
        "| `walnut` | - | - | - | 0 | no | no | 7 | not done within 7 s |\n"
    )
