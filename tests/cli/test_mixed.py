"""`--target-bits` and `--target-size`: what is printed, what the recipe replays, what is refused."""

import json

import pytest

from awq_core.cli import progress
from awq_core.mixed import Allocation, Choice, Target
from awq_core.plan_types import LinearPlan
from awq_core.quantization.sensitivity import Sensing
from awq_core.units import Unit

RUN = ["--group-size", 32, "--samples", 4, "--seq-len", 32]


def unit(block, *names):
    return Unit(block, tuple(LinearPlan(f"{block}.{name}", 64, 64, False, True, 32) for name in names))


ALLOCATION = Allocation(
    Target(bits=5.0),
    (
        Choice(unit("layers.9", "q", "k"), "q+k", 0.0123456, True),
        Choice(unit("layers.9", "down"), "down", 0.0005, False),
        Choice(unit("layers.10", "down"), "down", 0.0001, False),
    ),
    4.987,
    123_456,
)
TABLE = [
    "expected KL of 4 bits in each unit, in 1/1000 nat a token, and the bits it gets",
    "                   q+k       down",
    "layers.9    12.346  16   0.500   4",
    "layers.10                0.100   4",
    "1 of 3 units stay in 16 bits: 4.987 bits a weight, 123.5 KB, 5% of the expected KL is left",
]


def test_lines(capsys):
    with progress.quantizing(False) as receive:
        for event in (Sensing(0.25, 10.0), Sensing(1.0, 40.0), ALLOCATION):
            receive(event)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["sensitivity 25%  30 s left", "sensitivity 100%"]
    assert [line.split() for line in lines[2:]] == [line.split() for line in TABLE]
    assert len({line.rindex("4") for line in lines[4:6]}) == 1, "columns"


def test_json_lines(capsys):
    with progress.quantizing(True) as receive:
        receive(Sensing(0.25, 10.0))
        receive(ALLOCATION)
    sensing, allocation = map(json.loads, capsys.readouterr().out.splitlines())
    assert sensing == {"event": "sensitivity", "share": 0.25, "seconds": 10.0, "seconds_left": 30.0}
    assert allocation["event"] == "allocation" and allocation["bits"] == 4.987 and allocation["size"] == 123_456
    assert allocation["units"][0] == {
        "block": "layers.9",
        "unit": "q+k",
        "linears": ["layers.9.q", "layers.9.k"],
        "sensitivity": 0.0123456,
        "bits": 16,
    }


def test_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "watched", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    with progress.quantizing(False) as receive:
        receive(Sensing(0.5, 10.0))
        receive(ALLOCATION)
        receive(Sensing(1.0, 20.0))
    assert "1 of 3 units stay in 16 bits" in capsys.readouterr().err


def test_from_the_target_to_the_plan_of_its_recipe(awq, llama_source, corpus_file, tmp_path):
    recipe = tmp_path / "asked.yaml"
    recipe.write_text(f"model: {llama_source}\ncalib: {corpus_file}\ntarget_bits: 12\ngroup_size: 32\n")
    result = awq("quantize", "--recipe", recipe, "--out", tmp_path / "q", "--samples", 4, "--seq-len", 32, "--json")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    allocation = next(event for event in events if event["event"] == "allocation")
    assert events[-1]["bits"] == allocation["bits"] <= 12
    assert any(event["event"] == "sensitivity" for event in events)
    kept = {name for unit in allocation["units"] if unit["bits"] == 16 for name in unit["linears"]}
    again = awq("plan", llama_source, "--recipe", tmp_path / "q" / "recipe.yaml", "--json")
    linears = [one for block in json.loads(again.stdout)["blocks"] for one in block["linears"]]
    assert {one["name"] for one in linears if not one["quantize"]} == kept


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-bits", 3], "a target of 3 bits is less than all units in 4 bits take"),
        (["--target-size", "5PB"], "'5PB' is no size"),
        (["--target-size", "5GB", "--target-bits", 5], "both given"),
    ],
)
def test_refused(awq, llama_source, tmp_path, options, words):
    result = awq("quantize", llama_source, "--out", tmp_path / "q", *RUN, *options, code=2)
    assert any(words in line for line in result.errors)
    assert not (tmp_path / "q").exists()
