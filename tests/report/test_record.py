"""The record of a run: everything it decided, nothing of the machine, and no trust in what is read."""

import json
from dataclasses import replace
from importlib.metadata import version

import pytest

import awq_core
from awq_core import QuantConfig
from awq_core.errors import CheckpointError
from awq_core.report import RECORD, Cost, Record, read_record, write_record
from awq_core.report.record import BlockCost


@pytest.mark.parametrize("run", ["dense", "mixture"])
def test_every_report_is_in_the_record(request, run):
    folder, result = request.getfixturevalue(run)
    record = read_record(folder)
    rows = {row.name: row for row in record.rows}
    assert list(rows) == [linear.name for linear in result.plan.linears]
    assert {row.name for row in record.quantized} == {report.name for report in result.reports}
    for report in result.reports:
        row = rows[report.name]
        for name in ("tokens", "routed", "family", "alpha", "beta", "loss_rtn", "loss", "clipped", "flipped", "masked"):
            assert getattr(row, name) == getattr(report, name), (report.name, name)
        assert row.bits == 4 + 20 / 32 and row.note == report.note
    for linear in result.plan.linears:
        row = rows[linear.name]
        assert row.kept == linear.reason and (row.in_features, row.out_features) == (
            linear.in_features,
            linear.out_features,
        )
        assert linear.quantize or row.bits == 32
    assert (record.bytes_before, record.bytes_after) == (result.plan.bytes_before, result.plan.bytes_after)
    assert record.coverage == result.plan.coverage and record.config == result.plan.config.to_dict()
    assert record.calibration == {"source": result.calibration.source, "samples": 4, "tokens": 128}
    assert record.versions["torch"] == version("torch") and record.versions["awq-core"] == awq_core.__version__


def test_blocks_and_components(mixture):
    rows = {row.name: row for row in read_record(mixture[0]).rows}
    expert = next(name for name in rows if ".experts." in name)
    assert (rows[expert].component, rows[expert].block) == ("language", "model.layers.0")
    assert (rows["lm_head"].component, rows["lm_head"].block) == ("", "lm_head")


def test_nothing_of_the_machine_and_no_time_is_written(dense, llama_source):
    text = (dense[0] / RECORD).read_text()
    record = Record.from_json(text)
    assert record.model == llama_source.name and record.cost is None and record.evaluations == ()
    assert str(llama_source.parent) not in text and str(dense[0].parent) not in text


def test_what_is_read_is_what_was_written(record):
    cost = Cost(3.5, 1000, (BlockCost("model.layers.0", 1.25, 900),))
    whole = replace(record, cost=cost, evaluations=({"text": "notes", "perplexity": {"perplexity": 3.5}},))
    assert Record.from_json(whole.to_json()) == whole
    assert json.loads(whole.to_json())["rows"][0][0] == record.rows[0].name


def test_a_run_without_calibration(llama_source, tmp_path):
    awq_core.quantize(llama_source, tmp_path / "out", config=QuantConfig(group_size=32, scale=False, clip="none"))
    record = read_record(tmp_path / "out")
    assert not record.calibrated and record.calibration == {}
    assert all(row.loss is None and row.tokens == 0 for row in record.rows)


def test_time_of_earlier_runs_is_added():
    def paid(seconds, held, peak):
        return {"cost": {"seconds": seconds, "bytes": held, "peak": peak}}

    finished = {"a": paid(2.0, 10, 20), "b": paid(3.0, 11, 30), "everything outside the blocks": {}}
    cost = Cost.of(finished, ("a",), 5.0)
    assert cost == Cost(7.0, 30, (BlockCost("a", 2.0, 10), BlockCost("b", 3.0, 11)))


def test_the_result_has_a_cost_for_every_block(mixture):
    cost = mixture[1].cost
    assert [block.path for block in cost.blocks] == ["model.layers.0", "model.layers.1", "lm_head"]
    assert cost.peak > 0 and all(block.held > 0 for block in cost.blocks)
    assert cost.seconds >= sum(block.seconds for block in cost.blocks)


def test_adding_to_a_record(record, tmp_path):
    (tmp_path / RECORD).write_text(record.to_json())
    one = {"text": "notes", "against": {"model": "base"}, "perplexity": {"perplexity": 3.5}}
    other = {**one, "text": "other"}
    write_record(tmp_path, cost=Cost(1.0, 2), evaluations=[one, other])
    better = {**one, "perplexity": {"perplexity": 3.0}}
    write_record(tmp_path, evaluations=[better])
    found = read_record(tmp_path)
    assert found.cost == Cost(1.0, 2) and found.evaluations == (better, other)
    assert found.rows == record.rows and [path.name for path in tmp_path.iterdir()] == [RECORD]


def test_evaluations_of_other_figures_do_not_replace_one_another(record, tmp_path):
    (tmp_path / RECORD).write_text(record.to_json())
    kinds = [
        {"text": "notes", "perplexity": {"perplexity": 3.5}, "against": None},
        {"text": "notes", "perplexity": None, "bits_per_byte": {"bits_per_byte": 0.9}},
        {"text": None, "images": {"source": "photos"}},
        {"text": None, "images": {"source": "drawings"}},
        {"text": None, "tasks": {"metrics": {"arc.acc": {"value": 0.5}}}},
        {"text": None, "tasks": {"metrics": {"mmlu.acc": {"value": 0.5}}}},
        {"text": None, "tasks": {"metrics": [3]}},
    ]
    write_record(tmp_path, evaluations=kinds)
    again = {"text": None, "tasks": {"metrics": {"arc.acc": {"value": 0.25}}}}
    write_record(tmp_path, evaluations=[again])
    assert read_record(tmp_path).evaluations == (*kinds[:4], again, *kinds[5:])


def broken(record, **changes):
    return json.dumps({**json.loads(record.to_json()), **changes})


def test_what_is_no_record_is_refused_in_one_line(record, tmp_path, one_line):
    with pytest.raises(CheckpointError) as caught:
        read_record(tmp_path)
    one_line(caught.value, RECORD, "awq quantize")
    row = [*json.loads(record.to_json())["rows"][0]]
    alpha = json.loads(record.to_json())["columns"].index("alpha")
    cases = [
        "",
        "{}",
        "[]",
        "[" * 100_000,
        broken(record, format=2),
        broken(record, model=3),
        broken(record, bytes_before="much"),
        broken(record, rows=[row[:-1]]),
        broken(record, rows=[[*row[:alpha], "<b>", *row[alpha + 1 :]]]),
        broken(record, rows=[[*row[:alpha], True, *row[alpha + 1 :]]]),
        broken(record, rows=[[*row[:alpha], float("nan"), *row[alpha + 1 :]]]),
        broken(record, cost={"seconds": 1}),
        broken(record, cost={"seconds": 1, "peak": 2, "blocks": [["a", "b", 3]]}),
        broken(record, evaluations=[3]),
        broken(record, versions={"torch": 3}),
        broken(record, columns=["name"], rows=[["a"]]),
    ]
    for text in cases:
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(CheckpointError) as caught:
            read_record(tmp_path)
        one_line(caught.value, RECORD)
