"""The page: whole in itself, with every number of the run, and safe whatever things are called."""

import re
from dataclasses import replace

import pytest

from awq_core.errors import ConfigError, OutputError
from awq_core.report import PAGE, Cost, page_text, plots, read_record, write_page
from awq_core.report.record import BlockCost

pytest.importorskip("matplotlib")


def test_nothing_is_fetched_and_nothing_runs(dense, mixture, taken_apart):
    for folder, _ in (dense, mixture):
        text = page_text(read_record(folder), recipe="model: a")
        page = taken_apart(text)
        assert not {"script", "link", "img", "image", "iframe", "object", "embed", "use-external"} & {
            t for t, _ in page.tags
        }
        for tag, attributes in page.tags:
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name.endswith(("src", "href")):
                    assert value.startswith("#"), (tag, name, value)
        assert not re.search(r"https?://|@import|url\((?!#)|data:", text)
        policy = [
            a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_ink_follows_the_page(record, taken_apart):
    text = page_text(record)
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    assert plots.INK not in text and not re.search(r"(fill|stroke): ?(#000000|black|#ffffff|white)[^>]*font", text)
    page = taken_apart(text)
    assert page.count("svg") >= 6
    assert all(attributes.get("viewbox") for tag, attributes in page.tags if tag == "svg")


@pytest.mark.parametrize("run", ["dense", "mixture"])
def test_every_number_of_the_run_is_there(request, run, taken_apart):
    folder, result = request.getfixturevalue(run)
    page = taken_apart(page_text(read_record(folder)))
    single = [report for report in result.reports if report.routed is None]
    for report in single:
        place = len(page.cells) - 1 - page.cells[::-1].index(report.name)  # the head is a block too, above
        row = page.cells[place : place + 13]
        searched = report.family not in ("none", "reused")
        assert row[3] == report.family and row[2] == f"{4 + 20 / 32:.4g}"
        assert row[4:6] == ([f"{report.alpha:.4g}", f"{report.beta:.4g}"] if searched else ["-", "-"])
        assert row[6:9] == [f"{report.loss_rtn:.4g}", f"{report.loss:.4g}", f"{report.loss / report.loss_rtn:.2%}"]
        assert row[9:12] == [f"{share:.2%}" for share in (report.clipped, report.flipped, report.masked)]
        assert row[12] == str(report.tokens)
    for block in result.plan.blocks:
        mine = [report for report in result.reports if report.name.startswith(f"{block.path}.")]
        place = page.cells.index(block.path)
        rtn, ours = sum(report.loss_rtn for report in mine), sum(report.loss for report in mine)
        assert page.cells[place + 3 : place + 6] == [f"{rtn:.4g}", f"{ours:.4g}", f"{ours / rtn:.2%}"]
        assert page.cells[place + 1] == f"{len(mine)} of {len(block.linears)}"
    total = sum(report.loss for report in result.reports) / sum(report.loss_rtn for report in result.reports)
    assert f"output error{total:.1%}of round-to-nearest's" in page.text
    for version in read_record(folder).versions.values():
        assert version in page.cells


def test_flips_have_a_plot_and_numbers(dense, taken_apart):
    folder, result = dense
    assert any(report.flipped > 0 for report in result.reports)
    text = taken_apart(page_text(read_record(folder))).text
    assert "Flipped codes" in text and "Codes that are not the nearest, %" in text
    report = max(result.reports, key=lambda one: one.flipped)
    assert f"{100 * report.flipped:.2f}" in text and f"{report.flipped:.2%}" in text


def test_a_mixture_shows_its_experts(mixture, taken_apart):
    folder, result = mixture
    page = taken_apart(page_text(read_record(folder)))
    assert "Calibration tokens sent to each expert" in page.text
    counts = {}
    for report in result.reports:
        if report.routed is not None:
            layer, expert = report.name.split(".experts.")
            counts.setdefault(layer, {})[expert.partition(".")[0]] = report.routed
    assert len(counts) == 2
    for layer, found in counts.items():
        assert sum(found.values()) == 128  # each token goes to one expert
        place = page.cells.index(f"{layer}.experts")
        ordered = sorted(found.values())
        expected = ["4", str(ordered[0]), f"{(ordered[1] + ordered[2]) / 2:g}", str(ordered[3])]
        expected += [str(ordered.count(0)), str(sum(count < 96 for count in ordered))]
        assert page.cells[place + 1 : place + 7] == expected
    expert_rows = [cell for cell in page.cells if "experts.*" in cell]
    assert len(expert_rows) == 6 and all(cell.endswith("(x4)") for cell in expert_rows)
    assert "Bits by layer" in page.text and "asked for" in page.text


def test_errors_of_experts_are_summed(mixture, taken_apart):
    folder, result = mixture
    page = taken_apart(page_text(read_record(folder)))
    cell = next(cell for cell in page.cells if "experts.*" in cell)
    pattern = re.compile(re.escape(cell.removesuffix(" (x4)")).replace(r"\*", r"\d+"))
    mine = [report for report in result.reports if pattern.fullmatch(report.name)]
    place = page.cells.index(cell)
    assert len(mine) == 4 and page.cells[place + 7] == f"{sum(report.loss for report in mine):.4g}"


HOSTILE = "</title><script>alert(1)</script>\"'&{{ 7 * 7 }}{% raw %}$\\frac{$<svg onload=x> \u202e"


def test_names_are_only_names(record, taken_apart):
    rows = tuple(replace(row, name=f"{row.name}{HOSTILE}", kept=row.kept and HOSTILE) for row in record.rows)
    evaluation = {"text": HOSTILE, HOSTILE: HOSTILE, "perplexity": {"perplexity": 2.0, "protocol": HOSTILE}}
    cost = Cost(1.0, 2, (BlockCost(HOSTILE, 1.0, 3),))
    hostile = replace(record, model=HOSTILE, rows=rows, evaluations=(evaluation,), cost=cost, target=HOSTILE)
    page = taken_apart(page_text(hostile, recipe=HOSTILE))
    assert page.count("script") == 0 and page.count("title") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in "".join(page.words)
    assert page.count("svg") == taken_apart(page_text(replace(record, cost=cost))).count("svg")


def test_the_same_record_gives_the_same_page(record):
    assert page_text(record) == page_text(record)


def test_time_and_memory(record, taken_apart):
    blocks = tuple(BlockCost(f"model.layers.{i}", 1.25 + i, 2_000_000 + i) for i in range(2))
    page = taken_apart(page_text(replace(record, cost=Cost(3723.0, 3_000_000, blocks))))
    for words in ("1 h 2 min", "3.0 MB", "1.25 s", "2.25 s", "2.0 MB", "Time of each block", "Memory held after each"):
        assert words in page.text


def test_without_calibration(record, taken_apart):
    rows = tuple(replace(row, loss=None, loss_rtn=None, family="none", clipped=0.0, flipped=0.0) for row in record.rows)
    page = taken_apart(page_text(replace(record, rows=rows, calibration={})))
    assert "Nothing was calibrated" in page.text and "Scales" not in page.text
    assert "Not measured yet" in page.text


def test_sizes_before_and_after(record, taken_apart):
    text = taken_apart(page_text(replace(record, bytes_before=2_000_000, bytes_after=500_000))).text
    assert "500.0 KB" in text and "25.0% of 2.0 MB" in text


def test_a_deep_model_still_fits(record):
    """Hundreds of blocks: no cell's number is written, no picture is rasterised."""
    rows = []
    for block in range(200):
        rows += [
            replace(row, name=row.name.replace("layers.0", f"layers.{block}"), block=f"model.layers.{block}")
            for row in record.rows
            if row.block == "model.layers.0"
        ]
    text = page_text(replace(record, rows=tuple(rows)))
    assert "<image" not in text and "base64" not in text and len(text) < 4_000_000


def test_where_it_is_written(record, dense, tmp_path):
    assert write_page(dense[0], record, tmp_path / "page.html").read_text() == page_text(
        record, recipe=(dense[0] / "recipe.yaml").read_text()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OutputError):
        write_page(dense[0], record, tmp_path / "nowhere" / "page.html")
    with pytest.raises(OutputError):
        write_page(dense[0], record, tmp_path)
    assert not (dense[0] / PAGE).exists()


def test_without_matplotlib(record, monkeypatch, one_line):
    monkeypatch.setattr(plots, "available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        page_text(record)
    one_line(caught.value, "matplotlib", 'pip install "awq-core[plots]"')
