"""benchmarks/accuracy.py: the statistics are right, an interrupted benchmark goes on, the tables say what was measured,
and any architecture's weights find their places.
"""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS = {"nll": [2.0, 2.5, 3.1, 2.2], "kl": [0.01, 0.03, 0.02, 0.02], "agreement": [0.9, 0.8, 0.85, 0.95]}
THEIRS = {"nll": [2.1, 2.4, 3.3, 2.2], "kl": [0.03, 0.07, 0.05, 0.05], "agreement": [0.8, 0.7, 0.85, 0.9]}


@pytest.fixture(autouse=True)
def benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def key():
    from peers.results import Key

    return Key("tiny", "abc", "8 windows of 64 tokens, stdlib", 4)


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_ratio_of_means_and_its_error():
    from peers.tables import ratio

    a, b = THEIRS["kl"], OURS["kl"]
    found = ratio(tensor(a), tensor(b))
    expected = sum(a) / sum(b)
    rest = [one - expected * other for one, other in zip(a, b, strict=True)]
    error = math.sqrt(sum(value**2 for value in rest) / 3) / 2 / statistics.mean(b)
    assert (found.mean, found.stderr) == (pytest.approx(expected), pytest.approx(error))


def test_the_ratios_error_is_its_spread_over_samples():
    """Against drawing the windows again and again."""
    from peers.tables import ratio

    generator = torch.Generator().manual_seed(0)
    b = torch.rand(20000, 64, generator=generator, dtype=torch.float64) + 0.5
    a = 0.4 * b + 0.1 * torch.rand(20000, 64, generator=generator, dtype=torch.float64)
    spread = float((a.mean(1) / b.mean(1)).std())
    claimed = statistics.mean(ratio(one, other).stderr for one, other in zip(a[:300], b[:300], strict=True))
    assert claimed == pytest.approx(spread, rel=0.03)


def test_perplexity_ratio_pairs_windows():
    from peers.tables import perplexity_ratio

    found = perplexity_ratio(tensor(THEIRS["nll"]), tensor(OURS["nll"]))
    differences = [one - other for one, other in zip(THEIRS["nll"], OURS["nll"], strict=True)]
    expected = math.exp(statistics.mean(THEIRS["nll"])) / math.exp(statistics.mean(OURS["nll"]))
    assert found.mean == pytest.approx(expected)
    assert found.stderr == pytest.approx(expected * statistics.stdev(differences) / 2)


def test_what_is_there_is_not_measured_again(tmp_path, key):
    from peers.results import append, missing, read

    file = tmp_path / "new" / "results.jsonl"
    assert read(file) == {}
    done, failed = key.of_run("a", 128, "code"), key.of_run("b", 128, "code")
    append(file, done, OURS)
    append(file, failed, {"failed": "no"})
    elsewhere = [
        key.of_run("a", 32, "code"),
        key.of_run("a", 128, "prose"),
        type(key)("tiny", "trained further", key.calibration, 4, 128, "a", "code"),
        type(key)("tiny", "abc", key.calibration, 8, 128, "a", "code"),
    ]
    records = read(file)
    assert missing(records, [done, failed, *elsewhere]) == elsewhere
    assert missing(records, [done, failed], ["failed"]) == [failed]
    assert missing(records, [done, failed], ["a"]) == [done]
    append(file, failed, THEIRS)
    assert missing(read(file), [done, failed], ["failed"]) == [], "the later line counts"
    assert read(file)[failed]["kl"] == THEIRS["kl"]


def test_a_line_cut_short_by_a_kill_is_measured_again(tmp_path, key):
    from peers.results import append, missing, read

    file = tmp_path / "results.jsonl"
    first, second = key.of_run("a", 128, "code"), key.of_run("b", 128, "code")
    append(file, first, OURS)
    append(file, second, OURS)
    file.write_bytes(file.read_bytes()[:-20])
    assert missing(read(file), [first, second]) == [second]
    append(file, second, THEIRS)
    assert read(file)[second]["kl"] == THEIRS["kl"] and read(file)[first]["kl"] == OURS["kl"]
    assert [json.loads(line)["run"] for line in file.read_text().splitlines()] == ["a", "b"]
    file.write_text("{\n" + file.read_text())
    with pytest.raises(ValueError, match="line 1"):
        read(file)


def rows(text: str, title: str) -> dict[str, dict[str, str]]:
    """Of the table below a heading: {first cell: {column: cell}}."""
    lines = text.split(f"# {title}\n", 1)[1].split("\n#", 1)[0].splitlines()
    header, _, *cells = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line[:1] == "|")
    return {row[0]: dict(zip(header, row, strict=True)) for row in cells}


def test_tables(key):
    from peers.tables import report

    code, prose = (
        {name: key.of_run(name, 128, text) for name in ("x", "ours", "autoawq")} for text in ("code", "prose")
    )
    records = {
        key.of_run("original", 0, "code"): {"nll": [1.9, 2.4, 3.0, 2.1]},
        code["autoawq"]: THEIRS | {"settings": "AWQ", "version": "1.2", "bytes": 4_600_000},
        code["ours"]: OURS,
        code["x"]: {"failed": "ImportError: a | b"},
        prose["ours"]: THEIRS,
        prose["autoawq"]: OURS,
        type(key)("tiny", "old", key.calibration, 4, 128, "stale", "code"): THEIRS,
    }
    records = dict(reversed(records.items()))  # the old weights first, as in a file
    named = {one: {"run": one.run} | values for one, values in records.items()}
    text = report(named, "ours")
    assert "stale" not in text and text.index("## tiny\n") < text.index("### tiny: code")
    table = rows(text, "tiny: code, groups of 128")
    assert list(table)[:2] == ["original", "autoawq"]
    assert table["original"]["perplexity"].startswith(f"{math.exp(2.35):.3f} ± ")
    assert table["ours"]["KL"] == f"0.02000 ± {statistics.stdev(OURS['kl']) / 2:.5f}"
    assert table["ours"]["KL / ours"] == "1" and table["ours"]["same token"].startswith("87.50 ± ")
    theirs = table["autoawq"]
    differences = [a - b for a, b in zip(THEIRS["kl"], OURS["kl"], strict=True)]
    assert theirs["KL - ours"] == f"+0.03000 ± {statistics.stdev(differences) / 2:.5f}"
    assert theirs["KL / ours"].startswith("2.50 ± ") and theirs["perplexity / ours"].startswith("1.0513 ± ")
    assert (theirs["MB"], theirs["settings"]) == ("4.6", "AWQ, 1.2")
    assert table["x"]["KL"] == "failed: ImportError: a / b"
    targets = text.split("### tiny", 1)[0].splitlines()
    (met,) = [line for line in targets if "| code |" in line]
    (missed,) = [line for line in targets if "| prose |" in line]
    assert "**0.40 ± " in met and "| 0.9512 ± " in met, "2/5 is more than a third; the perplexity is lower"
    assert "**2.50 ± " in missed and "**1.0513 ± " in missed
    assert "KL / autoawq (≤ 0.33)" in text and "llmcompressor" not in text


def test_without_our_run_nothing_is_compared(key):
    from peers.tables import report

    one = key.of_run("autoawq", 128, "code")
    table = rows(report({one: THEIRS | {"run": "autoawq"}}, "ours"), "tiny: code, groups of 128")
    assert table["autoawq"]["KL"].startswith("0.05000") and table["autoawq"]["KL / ours"] == ""


def tiny(kind: str):
    from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    torch.manual_seed(0)
    if kind == "qwen2":
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, initializer_range=0.3))
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.data.normal_()
        return model.eval()
    return AutoModelForCausalLM.from_config(
        MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.3)
    ).eval()


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
@torch.no_grad()
def test_weights_under_names_of_files_find_their_places(tmp_path, kind):
    from peers.evaluate import with_weights
    from peers.layouts import plain_weights

    model = tiny(kind)
    model.save_pretrained(tmp_path)
    weights = plain_weights(tmp_path)
    other = tiny(kind)
    for value in other.parameters():
        value.zero_()
    ids = torch.arange(16)[None]
    torch.testing.assert_close(with_weights(other, dict(weights))(ids).logits, model(ids).logits)
    tied = dict(weights) | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    torch.testing.assert_close(with_weights(other, tied)(ids).logits, model(ids).logits)
    if kind == "mixtral":
        assert any(".experts.0.w1." in name for name in weights), "a file has each expert by itself"
        words = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        for memory in (words, words | {"block_sparse_moe": "mlp"}):
            renamed = {".".join(memory.get(word, word) for word in name.split(".")): w for name, w in weights.items()}
            torch.testing.assert_close(with_weights(other, renamed)(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match=r"model\.extra"):
        with_weights(other, dict(weights) | {"model.extra": torch.ones(2)})
    del weights["model.norm.weight"]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        with_weights(other, weights)


@torch.no_grad()
def test_measures_of_a_window_against_plain_sums(tmp_path):
    from peers.evaluate import measure

    original, other = tiny("qwen2"), tiny("qwen2")
    for value in other.parameters():
        value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    windows = [[3, 9, 27, 17, 51], [1, 2, 4, 8, 16]]
    first = measure(original, windows, tmp_path, original=True)
    found = measure(other, windows, tmp_path)
    for number, ids in enumerate(windows):
        p, q = (model(torch.tensor([ids])).logits[0].softmax(-1).double().tolist() for model in (original, other))
        nll = [sum(-math.log(rows[i][ids[i + 1]]) for i in range(4)) / 4 for rows in (p, q)]
        assert [first["nll"][number], found["nll"][number]] == pytest.approx(nll, rel=1e-5)
        kl = sum(a * math.log(a / b) for u, v in zip(p, q, strict=True) for a, b in zip(u, v, strict=True)) / 5
        assert found["kl"][number] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        same = sum(u.index(max(u)) == v.index(max(v)) for u, v in zip(p, q, strict=True)) / 5
        assert found["agreement"][number] == pytest.approx(same)
    other.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        measure(other, windows, tmp_path)


def script(*words: str) -> "subprocess.CompletedProcess[str]":
    code = f"import runpy, sys; sys.modules['torch'] = None; sys.argv = {['accuracy.py', *words]!r}; "
    code += f"runpy.run_path({str(BENCHMARKS / 'accuracy.py')!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS)


def test_the_command_line_needs_no_torch():
    done = script("--help")
    assert done.returncode == 0, done.stderr
    assert "gptqmodel:gptq" in done.stdout and "--table" in done.stdout
    for words, reason in (
        (["--out", "x"], "give models"),
        (["a/m", "b/m", "--out", "x"], "same name"),
        (["m", "--out", "x", "--peers", "nobody"], "no run is called nobody"),
        (["m", "--out", "x", "--text", "prose"], "not NAME=VALUE"),
        (["m", "--out", "x", "--run", "y={"], "not JSON"),
    ):
        done = script(*words)
        assert done.returncode == 2 and reason in done.stderr
