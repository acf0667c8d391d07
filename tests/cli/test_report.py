"""`awq report`, and the page at the end of `awq quantize`."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

import awq_core
from awq_core.evaluation import divergence, perplexity
from awq_core.report import PAGE, RECORD, plots, read_record

pytest.importorskip("matplotlib")


@pytest.fixture
def run(quantized_llama, tmp_path):
    """A finished run, to be reported on."""
    return shutil.copytree(quantized_llama, tmp_path / "run")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(
        json.dumps({"model": "m", "text": "my notes", "perplexity": {"perplexity": 8.125}, "against": None})
    )
    return path


def test_quantizing_ends_with_a_page(awq, llama_source, tmp_path, corpus_file):
    out = tmp_path / "out"
    command = ["quantize", llama_source, "--out", out, "--group-size", 32, "--calib", corpus_file]
    result = awq(*command, "--samples", 2, "--seq-len", 32, "--json")
    done = json.loads(result.stdout.splitlines()[-1])
    assert done["event"] == "done" and done["page"] == str(out / PAGE)
    text = (out / PAGE).read_text()
    assert text.startswith("<!DOCTYPE html>") and "Time of each block" in text and "group_size: 32" in text
    record = read_record(out)
    assert [block.path for block in record.cost.blocks] == ["model.layers.0", "model.layers.1"]
    assert record.cost.seconds >= done["seconds"]
    for name in (PAGE, RECORD, "README.md"):
        assert str(tmp_path) not in (out / name).read_text()


def test_quantizing_without_matplotlib(awq, llama_source, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    out = tmp_path / "out"
    result = awq("quantize", llama_source, "--out", out, "--group-size", 32, "--no-scale")
    assert not (out / PAGE).exists() and read_record(out).cost is not None
    assert sum("matplotlib" in line for line in result.errors) == 1
    error = awq("report", out, code=2).errors[-1]
    assert 'pip install "awq-core[plots]"' in error


def test_a_page_that_cannot_be_written_is_no_failure_of_the_run(awq, llama_source, tmp_path, monkeypatch):
    from awq_core import report
    from awq_core.errors import OutputError

    def full(*args):
        raise OutputError("disk full")

    monkeypatch.setattr(report, "write_page", full)
    result = awq("quantize", llama_source, "--out", tmp_path / "out", "--group-size", 32, "--no-scale")
    assert "no report: disk full" in result.errors and (tmp_path / "out" / "config.json").exists()


def test_a_report_of_a_run_from_python(awq, run):
    before = contents(run)
    result = awq("report", run)
    assert result.stdout.strip() == str(run / PAGE) and "--against" in result.errors[-1]
    after = contents(run)
    assert after.pop(PAGE) and after == before


def test_evaluations_are_kept_and_shown(awq, read_json, run, evaluation):
    before = (run / "README.md").read_text()
    data = read_json(awq("report", run, "--eval", evaluation, "--json"))
    assert data["evaluations"] == 1 and data["page"] == str(run / PAGE)
    for _ in range(2):
        for text in ((run / PAGE).read_text(), (run / "README.md").read_text()):
            assert "my notes" in text and "8.1250" in text
        (run / PAGE).unlink()
        awq("report", run)
    assert before != (run / "README.md").read_text()
    assert len(read_record(run).evaluations) == 1


def test_with_out_the_folder_stays_as_it_is(awq, run, evaluation, tmp_path):
    before = contents(run)
    awq("report", run, "--eval", evaluation, "--out", tmp_path / "page.html")
    assert contents(run) == before and "8.1250" in (tmp_path / "page.html").read_text()


def test_measuring(awq, run, llama_source, corpus_file):
    awq("report", run, "--against", llama_source, "--text", corpus_file, "--max-windows", 2)
    (found,) = read_record(run).evaluations
    original, candidate = awq_core.load(llama_source), awq_core.load(run)
    tokenizer, text = AutoTokenizer.from_pretrained(run), corpus_file.read_text()
    assert found["perplexity"] == perplexity(candidate, tokenizer, text, max_windows=2).to_dict()
    assert found["against"]["perplexity"] == perplexity(original, tokenizer, text, max_windows=2).to_dict()
    apart = found["against"]["divergence"]
    direct = divergence(
        original, candidate, tokenizer, text, window=apart["window"], max_windows=apart["windows"]
    ).to_dict()
    assert apart == json.loads(json.dumps(direct))
    assert found["against"]["model"] == llama_source.name and found["model"] == run.name
    page = (run / PAGE).read_text()
    for number in (found["perplexity"]["perplexity"], found["against"]["perplexity"]["perplexity"]):
        assert f"{number:.4f}" in page
    assert f"{apart['kl_mean']:.5f}" in page and f"{apart['top1_agreement']:.2%}" in page


def test_a_card_without_the_marks_is_left(awq, run, evaluation):
    (run / "README.md").write_text("# Mine\n")
    result = awq("report", run, "--eval", evaluation)
    assert (run / "README.md").read_text() == "# Mine\n"
    assert any("README.md" in line and "stays" in line for line in result.errors)


def test_a_wrong_original_is_said_before_anything_is_measured(awq, run, monkeypatch):
    monkeypatch.setattr("awq_core.cli.models.open_model", lambda *args, **kwargs: pytest.fail("a model was opened"))
    assert "./nowhere: no such model" in awq("report", run, "--against", "./nowhere", code=1).errors[-1]


def test_mistakes(awq, run, tmp_path, llama_source):
    assert "holds no awq_report.json" in awq("report", llama_source, code=1).errors[-1]
    assert "cannot be read" in awq("report", run, "--eval", tmp_path / "none.json", code=2).errors[-1]
    assert "--text needs --against" in awq("report", run, "--text", "notes.txt", code=2).errors[-1]
    assert "cannot write" in awq("report", run, "--out", tmp_path / "no" / "page.html", code=1).errors[-1]
    (run / RECORD).write_text("{}")
    assert "no record of a run" in awq("report", run, code=1).errors[-1]
