"""`awq demo` on a stand-in model: every step is announced, results come from disk, nobody's files are touched."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from awq_core.cli import demo, demo_data
from awq_core.cli.demo_measure import Remembering
from awq_core.errors import CheckpointError, OutputError

SETTINGS = ["--group-size", "32", "--samples", "2", "--windows", "2"]
HELD_OUT = ["bdb.py", "no_such_module.py", "email/_policybase.py"]


@pytest.fixture
def model(model_folder) -> Path:
    (model_folder / "held_out.json").write_text(json.dumps(HELD_OUT))
    return model_folder


def test_demo(awq, model, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out"
    result = awq("demo", "--model", model, "--out", out, *SETTINGS)
    steps = [line[:3] for line in result.errors if line[1:2] == "/"]
    assert steps == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert any("plugin tiny (awq-plugin-tiny 1.2) owns it: family tiny" in line for line in result.errors)
    assert any("3 modules are left out" in line for line in result.errors)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["fp32", "RTN g32", "AWQ g32"]
    assert all(len(row) == 6 for row in rows)
    assert rows[0][2:4] == ["", ""] and "±" in rows[1][2] and rows[2][3].endswith("%")
    assert result.stdout.count("    def read_json(path):") == 3
    assert {path.name for path in out.iterdir()} == {"rtn-g32", "awq-g32", "demo.json"}
    assert all((out / name / "config.json").is_file() for name in ("rtn-g32", "awq-g32"))


def test_again_as_json(awq, read_json, model, tmp_path):
    out = tmp_path / "out"
    first = awq("demo", "--model", model, "--out", out, *SETTINGS, "--json")
    again = read_json(awq("demo", "--model", model, "--out", out, *SETTINGS, "--json"))
    rows = again["rows"]
    assert [row["name"] for row in rows] == ["fp32", "RTN g32", "AWQ g32"]
    assert rows[0]["kl_mean"] is None and rows[1]["kl_mean"] > 0
    assert rows[1]["bytes"] == (out / "rtn-g32" / "model.safetensors").stat().st_size < rows[0]["bytes"]
    assert again["held_out"] == HELD_OUT
    timed = ("tokens_per_second",)
    same = [{key: value for key, value in row.items() if key not in timed} for row in read_json(first)["rows"]]
    assert same == [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_without_the_model(awq, tmp_path, monkeypatch):
    line = awq("demo", "--model", tmp_path / "none", code=1).errors[-1]
    assert line.endswith("no model folder - try: run it from a checkout of awq-core, or give --model DIR")
    monkeypatch.setattr(demo_data, "EXAMPLE", Path("no-such-example"))
    assert "no-such-example: no model folder" in awq("demo", code=1).errors[-1]


def test_without_the_list_of_held_out_modules(awq, model_folder):
    assert "held_out.json: missing or not JSON" in awq("demo", "--model", model_folder, code=1).errors[-1]
    (model_folder / "held_out.json").write_text('{"bdb.py": 1}')
    assert "not a list of module paths" in awq("demo", "--model", model_folder, code=1).errors[-1]


def test_a_folder_that_is_not_the_demos_stays(awq, model, tmp_path):
    mine = tmp_path / "out" / "awq-g32"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    line = awq("demo", "--model", model, "--out", tmp_path / "out", *SETTINGS, code=1).errors[-1]
    assert "was not made by the demo" in line
    assert (mine / "notes.txt").read_text() == "mine"


def test_clear_output(tmp_path):
    out = tmp_path / "out"
    demo_data.clear_output(out, ["a"])
    (out / "a").mkdir()
    (out / "kept").mkdir()
    demo_data.clear_output(out, ["b", "a"])
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "kept"]
    with pytest.raises(OutputError, match="kept is there"):
        demo_data.clear_output(out, ["kept"])
    (out / "demo.json").write_text("[]")
    with pytest.raises(OutputError, match="not the demo's list"):
        demo_data.clear_output(out, ["a"])
    with pytest.raises(OutputError):
        demo_data.clear_output(out / "demo.json", ["a"])


def test_held_out_text_is_an_equal_share_from_the_middle_of_each_module():
    root = Path(sysconfig.get_paths()["stdlib"])
    first, second = demo_data.held_out_texts(HELD_OUT, 4000)
    for name, text in (("bdb.py", first), ("email/_policybase.py", second)):
        source = (root / name).read_text(encoding="utf-8")
        assert text in source and len(text) == 2000
        assert source.index(text) > 1000


def test_calibration_leaves_the_held_out_modules_out(llama_source):
    root = Path(sysconfig.get_paths()["stdlib"])
    all_but_one = [path.name for path in root.glob("*.py") if path.name != "textwrap.py"]
    tokenizer = AutoTokenizer.from_pretrained(llama_source)
    data = demo.calibration(tokenizer, all_but_one, 4, 64)
    assert data.samples == 4
    for window in data.batches[0]["input_ids"]:
        assert tokenizer.decode(window) in (root / "textwrap.py").read_text(encoding="utf-8")


def test_held_out_names_stay_inside_the_library(tmp_path):
    (tmp_path / "secret.py").write_text("x = 1\n")
    for name in ("../../../../../../etc/hostname", str(tmp_path / "secret.py"), "gone.py"):
        with pytest.raises(CheckpointError, match="none of the modules"):
            demo_data.held_out_texts([name], 100)


def test_an_example_elsewhere_is_found_from_any_folder(tmp_path, monkeypatch):
    example = Path(__file__).parents[2] / demo_data.EXAMPLE
    if not (example / "config.json").is_file():
        pytest.skip("this checkout has no example model")
    monkeypatch.chdir(tmp_path)
    assert demo_data.model_folder(None).samefile(example)


def test_a_remembered_window_is_computed_once(llama_source):
    import awq_core

    model = awq_core.load(llama_source)
    calls = []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    remembering = Remembering(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first, second = remembering(ids, use_cache=False), remembering(ids.clone(), use_cache=False)
        other = remembering(torch.tensor([[7, 6, 5]]), use_cache=False)
    assert first is second and len(calls) == 2
    assert not torch.equal(first.logits, other.logits)
    assert remembering.device == model.device
