"""The model card's section: it comes and is renewed between its marks, and what people wrote stays."""

from dataclasses import replace

from awq_core.report import read_record, update_card
from awq_core.report.card import BEGIN, END, MOST_BLOCKS, escaped, section

EVALUATION = {
    "text": "notes",
    "perplexity": {"perplexity": 8.5, "protocol": "3 windows", "tokens": 99},
    "against": {"model": "base", "perplexity": {"perplexity": 8.0}},
}


def test_a_run_writes_it(dense, mixture):
    for folder, result in (dense, mixture):
        card = (folder / "README.md").read_text()
        assert card.count(BEGIN) == card.count(END) == 1
        record = read_record(folder)
        assert section(record) in card
        first = [report for report in result.reports if report.name.startswith("model.layers.0.")]
        rtn, ours = sum(one.loss_rtn for one in first), sum(one.loss for one in first)
        assert f"| model.layers.0 | {rtn:.4g} | {ours:.4g} | {ours / rtn:.2%} |" in card
        assert card.startswith("---\n") and card.index("## Kept") < card.index(BEGIN) < card.index("## Use")
    assert "Calibration tokens by expert" in card and "| model.layers.1.mlp.experts | 4 |" in card


def test_it_is_renewed_and_the_rest_stays(dense, record, tmp_path):
    before = (dense[0] / "README.md").read_text().replace("## Use", "My own words.\n\n## Use")
    (tmp_path / "README.md").write_text(before)
    assert update_card(tmp_path, replace(record, evaluations=(EVALUATION,)))
    card = (tmp_path / "README.md").read_text()
    assert "| perplexity | 8.0000 | 8.5000 | +0.5000 (+6.25%) |" in card and "My own words." in card
    assert update_card(tmp_path, record)
    assert (tmp_path / "README.md").read_text() == before


def test_without_marks_nothing_is_touched(record, tmp_path):
    assert not update_card(tmp_path, record) and list(tmp_path.iterdir()) == []
    for text in ("# Mine\n", f"# Mine\n{BEGIN}\n", f"# Mine\n{END}\n"):
        (tmp_path / "README.md").write_text(text)
        assert not update_card(tmp_path, record)
        assert (tmp_path / "README.md").read_text() == text


def test_names_are_only_names(record):
    hostile = f"<script>|`*_[a](b)\n## x ![i](j) {END}"
    document = {**EVALUATION, "text": hostile, hostile: hostile}
    rows = tuple(replace(row, block=hostile, name=f"{hostile}.{row.name}") for row in record.rows)
    text = section(replace(record, rows=rows, evaluations=(document,), versions={hostile: hostile}))
    assert text.count(END) == 1 and text.endswith(END) and "<script" not in text.replace("\\<script", "")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in tables}
    assert widths == {5, 8} and "\n## x" not in text
    assert escaped("a|b\n`c`") == "a\\|b \\`c\\`"


def test_many_blocks_are_cut_short(record):
    rows = []
    for block in range(50):
        rows += [
            replace(row, name=row.name.replace("layers.0", f"layers.{block}"), block=f"model.layers.{block}")
            for row in record.rows
            if row.block == "model.layers.0"
        ]
    text = section(replace(record, rows=tuple(rows)))
    assert text.count("| model.layers.") == MOST_BLOCKS and "| ... |" in text
    assert "| model.layers.49 |" in text and "| model.layers.25 |" not in text
