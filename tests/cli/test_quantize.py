"""`awq quantize`: options become the right configuration, events come as lines or JSON, failures leave nothing."""

import json

import pytest

from awq_core.checkpoint.format import read_quantization_config
from awq_core.cli.options import make_config

DEFAULTS = {
    "group_size": 128,
    "bits": 4,
    "rounding": "nearest",
    "no_scale": False,
    "clip": None,
    "no_clip": False,
    "components": (),
}


@pytest.mark.parametrize(
    ("options", "scale", "clip"),
    [
        ({}, True, "asymmetric"),
        ({"no_clip": True}, True, "none"),
        ({"clip": "none"}, True, "none"),
        ({"no_scale": True}, False, "none"),
        ({"no_scale": True, "clip": "asymmetric"}, False, "asymmetric"),
        ({"no_scale": True, "no_clip": True}, False, "none"),
    ],
)
def test_steps(options, scale, clip):
    config = make_config(**{**DEFAULTS, **options})
    assert (config.scale, config.clip) == (scale, clip)


def test_components_and_seed():
    config = make_config(**{**DEFAULTS, "components": (("vision", "keep"), ("vision", "keep"))}, seed=5)
    assert config.components == {"vision": "keep"} and config.seed == 5


def test_keep(awq, llama_source, tmp_path):
    options = ["--group-size", 32, "--no-scale", "--keep", "layers.0.mlp", "--keep", "q_porj"]
    result = awq("quantize", llama_source, "--out", tmp_path / "q", *options)
    assert "no linear's name contains 'q_porj': nothing is kept by it" in result.errors
    assert not any("layers.0.mlp'" in line for line in result.errors)
    names = set(
        json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    )
    assert names == {"lm_head", "model.layers.0.mlp"}
    plan = awq("plan", llama_source, *options)
    assert "  3: asked for: modules_to_not_convert has 'layers.0.mlp'" in plan.stdout.splitlines()
    assert "no linear's name contains 'q_porj': nothing is kept by it" in plan.errors
    assert plan.errors[-1].endswith("--keep layers.0.mlp --keep q_porj --out DIR")


def test_the_head_on_request(awq, llama_source, tmp_path):
    options = ["--group-size", 32, "--no-scale", "--lm-head", "--lm-head-chunks", 3, "--layers-per-batch", 2]
    result = awq("quantize", llama_source, "--out", tmp_path / "q", *options)
    assert any("the output head lm_head is 4-bit too" in line for line in result.errors)
    assert sum("--layers-per-batch is not needed" in line for line in result.errors) == 1
    settings = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert settings["lm_head"] is True and settings["modules_to_not_convert"] == []
    config = make_config(**DEFAULTS, lm_head=True, lm_head_chunks=3)
    assert config.lm_head and config.lm_head_chunks == 3
    assert (make_config(**DEFAULTS).lm_head, make_config(**DEFAULTS).lm_head_chunks) == (False, 0)


def test_round_to_nearest_needs_no_calibration(awq, llama_source, tmp_path):
    options = ["--group-size", 32, "--rounding", "nearest", "--no-scale", "--json"]
    lines = [
        json.loads(line)
        for line in awq("quantize", llama_source, "--out", tmp_path / "q", *options).stdout.splitlines()
    ]
    assert [line["event"] for line in lines] == ["phase", "block", "block", "done"]
    assert [(line["done"], line["total"], line["path"]) for line in lines[1:3]] == [
        (1, 2, "model.layers.0"),
        (2, 2, "model.layers.1"),
    ]
    assert lines[2]["seconds_left"] == 0 <= lines[1]["seconds_left"]
    assert all(100e6 < line["memory_bytes"] < 100e9 for line in lines[1:3])
    done = lines[-1]
    assert done["calibration"] is None and done["loss"] is None
    assert (done["quantized"], done["kept"], done["family"]) == (14, 1, "tiny")
    assert done["bytes_after"] == (tmp_path / "q" / "model.safetensors").stat().st_size < done["bytes_before"]
    raw = json.loads((tmp_path / "q" / "config.json").read_text())
    assert read_quantization_config(raw).group_size == 32


def test_calibrated_run_in_lines(awq, llama_source, corpus_file, tmp_path):
    out = tmp_path / "q"
    options = ["--group-size", 32, "--calib", corpus_file, "--samples", 2, "--seq-len", 64]
    result = awq("quantize", llama_source, "--out", out, *options)
    start = next(index for index, line in enumerate(result.errors) if "scale groups proved" in line)
    calibration, before, after = result.errors[start + 1 : start + 4]
    assert calibration == "calibration: 2 samples, 128 tokens from corpus.txt"
    assert before.startswith("block 1/2  model.layers.0  ") and " left  error " in before and "%)  " in before
    assert before.endswith("B in use")
    assert after.startswith("block 2/2  model.layers.1  ") and " left" not in after
    where, error = result.stdout.splitlines()
    assert where.startswith(f"{out}: ") and " -> " in where
    assert error.startswith("output error ") and "of round-to-nearest's" in error
    assert f"next: awq generate {out} --prompt 'Once upon a time'" in result.errors
    assert f"      awq eval {out} --against {llama_source}" in result.errors
    assert (out / "config.json").is_file()


def test_clip_without_scales_calibrates(awq, llama_source, corpus_file, tmp_path):
    options = ["--group-size", 32, "--no-scale", "--clip", "asymmetric", "--calib", corpus_file]
    options += ["--samples", 2, "--seq-len", 64, "--json"]
    done = json.loads(awq("quantize", llama_source, "--out", tmp_path / "q", *options).stdout.splitlines()[-1])
    assert done["config"]["scale"] is False and done["config"]["clip"] == "asymmetric"
    assert done["calibration"] == {"source": "corpus.txt", "samples": 2, "tokens": 128}
    assert 0 < done["loss"] <= done["loss_rtn"]


def test_fewer_samples_than_asked_for_is_said(awq, llama_source, corpus_file, tmp_path):
    options = ["--group-size", 32, "--no-clip", "--calib", corpus_file, "--samples", 100, "--seq-len", 128]
    errors = awq("quantize", llama_source, "--out", tmp_path / "q", *options).errors
    assert any(line.startswith("note: ") and "of the 100 samples asked for" in line for line in errors)


def test_calibration_that_is_not_read_is_said(awq, llama_source, tmp_path):
    options = ["--group-size", 32, "--no-scale", "--calib", tmp_path / "not-there.txt"]
    errors = awq("quantize", llama_source, "--out", tmp_path / "q", *options).errors
    assert "round-to-nearest needs no calibration: --calib is not read" in errors


def test_the_last_json_line_of_a_failed_run_is_the_error(awq, llama_source, tmp_path):
    options = ["--group-size", 32, "--calib", tmp_path / "none.txt", "--json"]
    result = awq("quantize", llama_source, "--out", tmp_path / "q", *options, code=1)
    phase, error = (json.loads(line) for line in result.stdout.splitlines())
    assert phase["event"] == "phase"
    assert error["exit_code"] == 1 and "none.txt" in error["error"] and error["hint"]
    assert not (tmp_path / "q").exists()


def test_failures(awq, llama_source, quantized, tmp_path, plugins):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty" in awq("quantize", llama_source, "--out", tmp_path / "full", code=1).errors[-1]
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    assert "already quantized" in awq("quantize", quantized, "--out", tmp_path / "q", code=1).errors[-1]
    assert "--out" in awq("quantize", llama_source, code=2).stderr
    device = ["--out", tmp_path / "q", "--device", "abacus"]
    assert "abacus" in awq("quantize", llama_source, *device, code=2).errors[-1]
    plugins()
    assert awq("quantize", llama_source, "--out", tmp_path / "q", code=3).errors
    assert not (tmp_path / "q").exists()


@pytest.fixture
def interrupted(awq, llama_source, corpus_file, tmp_path, monkeypatch):
    """The words of a command that was interrupted after its first block."""
    from awq_core.quantization.engine import Engine

    words = ["quantize", llama_source, "--out", tmp_path / "out", "--calib", corpus_file, "--samples", 2]
    words += ["--seq-len", 16, "--group-size", 32]
    finish, seen = Engine._quantize, []

    def only_once(self, block, plan, *rest):
        if seen:
            raise KeyboardInterrupt
        seen.append(plan.path)
        finish(self, block, plan, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_quantize", only_once)
        awq(*words, code=130)
    assert not (tmp_path / "out" / "config.json").exists()
    return words


def test_the_same_command_resumes_an_interrupted_run(awq, interrupted, tmp_path):
    assert "resuming: 1 finished" in awq(*interrupted).stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_other_arguments_are_refused_until_told_to_restart(awq, interrupted, tmp_path):
    refused = awq(*interrupted, "--no-clip", code=1).errors[-1]
    assert "config.clip" in refused and "--restart" in refused
    assert "resuming" not in awq(*interrupted, "--no-clip", "--restart").stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_tokens_of_experts(tmp_path, capsys):
    """By expert in JSON; for the eye only where some were sent fewer than they have input channels."""
    from types import SimpleNamespace

    from awq_core.cli.quantize import routed_tokens, tell
    from awq_core.quantization.block import LinearReport

    def report(name, routed):
        return LinearReport(name, 900, 0.5, "duo", 2.0, 1.0, 0.0, routed=routed)

    sent = {"mlp.experts.0": 95, "mlp.experts.1": 63, "mlp.experts.2": 500}
    reports = [report("attn.q", None), *(report(f"{e}.{name}", n) for e, n in sent.items() for name in ("up", "down"))]
    widths = [SimpleNamespace(name=r.name, in_features=96 if r.name.endswith("down") else 64) for r in reports]
    plan = SimpleNamespace(bytes_before=2000, linears=widths)
    result = SimpleNamespace(out=tmp_path, plan=plan, reports=reports, seconds=1.0)
    assert routed_tokens(result) == sent
    tell(result)
    assert "2 of 3 experts were sent fewer tokens than they have input channels" in capsys.readouterr().out
    result.reports = [reports[0], *reports[-2:]]
    tell(result)
    assert "were sent" not in capsys.readouterr().out


def test_subsets_of_a_corpus(awq, llama_source, corpus, tmp_path):
    rows = [{"text": text, "meta": {"pile_set_name": name}} for text in corpus for name in ("ArXiv", "Github", "Enron")]
    path = tmp_path / "pile.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--group-size", 32, "--no-clip", "--rounding", "nearest", "--samples", 4, "--seq-len", 64, "--json"]
    options = ["--calib", path, "--calib-subsets", "arxiv,Github", "--calib-exclude", "GITHUB"]
    out = tmp_path / "q"
    done = json.loads(awq("quantize", llama_source, "--out", out, *common, *options).stdout.splitlines()[-1])
    assert done["calibration"]["mixture"] == {"ArXiv": 256}
    assert "pile.jsonl; ArXiv 100.0% of the tokens" in (out / "README.md").read_text()
    recipe = (out / "recipe.yaml").read_text()
    assert "# calibration mixture: ArXiv 100.0% of the tokens" in recipe
    assert "calib_subsets: arxiv,Github\n" in recipe and "calib_exclude: GITHUB\n" in recipe
    # The same texts alone calibrate to the same weights, and so does the recipe.
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus))
    awq("quantize", llama_source, "--out", tmp_path / "a", *common, "--calib", alone)
    awq("quantize", llama_source, "--out", tmp_path / "r", "--recipe", out / "recipe.yaml", "--calib", path)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("q", "a", "r")]
    assert weights[0] == weights[1] == weights[2]


def test_subsets_that_are_not_there(awq, llama_source, corpus_file, tmp_path):
    out = ["--out", tmp_path / "q", "--group-size", 32]
    assert "--calib, which is missing" in awq("quantize", llama_source, *out, "--calib-subsets", "A", code=2).stderr
    named = awq("quantize", llama_source, *out, "--calib", corpus_file, "--calib-subsets", "A", code=1).errors[-1]
    assert "names no subset (meta.pile_set_name)" in named
