"""`awq bench`: the tokens are generate's, figures follow from the runs, models run in turn, failures say why."""

import os
import re
from pathlib import Path

import click
import pytest
import torch

import awq_core
from awq_core.cli.bench import bench
from awq_core.evaluation import measure_speed, speed, timing
from awq_core.evaluation.speed import weight_bytes
from awq_core.evaluation.timing import Run, random_prompt, timed_run

SHORT = ["--batch", "1,2", "--context", "5,12", "--new", 4, "--rounds", 2, "--device", "cpu"]


@pytest.fixture
def fake_clock(monkeypatch):
    """Time stands still but for what `clock.pass_(seconds)` adds."""

    class Clock:
        now = 0.0

        def pass_(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return clock


# -- the runs


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_generate(quantized, batch):
    model = awq_core.load(quantized)
    prompt = random_prompt(torch.arange(128), batch, 9, seed=3)
    run = timed_run(model, prompt, 7)
    settings = {"do_sample": False, "max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 0}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert torch.equal(run.tokens, made[:, 9:])
    assert len(run.steps) == 6 and run.first > 0 and min(run.steps) > 0


def test_tokens_are_those_of_a_model_without_a_cache(llama_source):
    model = awq_core.load(llama_source)
    sequence = random_prompt(torch.arange(128), 2, 6)
    run = timed_run(model, sequence, 5)
    for _ in range(5):
        with torch.no_grad():
            sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(run.tokens, sequence[:, 6:])


def test_a_cache_of_fixed_size(llama_source, monkeypatch):
    """`generate` runs it: the same tokens, as many steps, an end token or none."""
    model = awq_core.load(llama_source)
    prompt = random_prompt(torch.arange(128), 2, 6)
    expected = timed_run(model, prompt, 5).tokens
    model.generation_config.cache_implementation = "static"
    generate, calls = model.generate, []
    monkeypatch.setattr(model, "generate", lambda *given, **settings: calls.append(1) or generate(*given, **settings))
    run = timed_run(model, prompt, 5)
    assert calls and torch.equal(run.tokens, expected)
    assert run.first > 0 and len(run.steps) == 4 and min(run.steps) > 0
    model.generation_config.eos_token_id = int(expected[0, 0])
    assert timed_run(model, prompt, 5).tokens.shape == (2, 5)


def test_an_end_token_does_not_stop_it(llama_source):
    model = awq_core.load(llama_source)
    prompt = random_prompt(torch.arange(128), 1, 6)
    model.generation_config.eos_token_id = int(timed_run(model, prompt, 1).tokens)
    assert timed_run(model, prompt, 6).tokens.shape == (1, 6)


def test_memory_is_at_least_the_weights(llama_source):
    model = awq_core.load(llama_source)
    own = sum(parameter.nbytes for parameter in model.parameters())
    assert own <= weight_bytes(model) < 2 * own
    assert timed_run(model, random_prompt(torch.arange(128), 1, 4), 2).memory > weight_bytes(model)


def test_shared_weights_count_once():
    first, second = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    assert weight_bytes(torch.nn.Sequential(first, second)) == 8 * 8 * 4


# -- the prompts


def test_prompts_are_drawn_from_the_seed():
    ids = torch.arange(100)
    drawn = [random_prompt(ids, 2, 50, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0].shape == (2, 50) and torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_placeholders_are_not_drawn(llama_source):
    model = awq_core.load(llama_source)
    model.config.image_token_id, model.config.video_token_index, model.config.eos_token_id = 5, 6, [7, 8]
    assert set(range(128)) - set(speed._vocabulary([model]).tolist()) == {5, 6, 7, 8}


# -- the figures


def test_figures_follow_from_the_runs(llama_source, monkeypatch):
    """Made-up times: medians of the rounds, and the ratio round by round, with whoever runs first changing."""
    first, second = awq_core.load(llama_source), awq_core.load(llama_source)
    # (time to first token, each of the two steps); the first entry of each is the warm-up
    times = {id(first): [(9.0, 9.0), (1.0, 0.5), (2.0, 0.25), (4.0, 1.0)]}
    times[id(second)] = [(9.0, 9.0), (3.0, 1.0), (2.0, 1.0), (8.0, 8.0)]
    order = []

    def run(model, prompt, new_tokens):
        order.append(model is first)
        one, step = times[id(model)].pop(0)
        return Run(torch.zeros(2, new_tokens), one, (step,) * (new_tokens - 1), 10**9 * (1 if model is first else 2))

    monkeypatch.setattr(speed, "timed_run", run)
    told = []
    settings = {"batches": [2], "contexts": [10], "new_tokens": 3, "rounds": 3}
    (point,) = measure_speed([first, second], **settings, progress=lambda *state: told.append(state))
    mine, theirs = point.speeds
    assert (mine.first_token_seconds, theirs.first_token_seconds) == (2.0, 3.0)
    assert mine.prefill_tokens_per_second == 2 * 10 / 2.0 and theirs.prefill_tokens_per_second == 2 * 10 / 3.0
    assert mine.decode_tokens_per_second == 2 / 0.5 and theirs.decode_tokens_per_second == 2 / 1.0
    held = weight_bytes(first)
    assert (mine.memory_bytes, theirs.memory_bytes) == (10**9 - held, 2 * 10**9 - held)
    assert point.ratio.prefill == 2.0  # of 3, 1, 2
    assert point.ratio.decode == 4.0  # of 2, 4, 8
    assert point.ratio.memory == (10**9 - held) / (2 * 10**9 - held)
    assert order == [True, False, True, False, False, True, True, False]
    assert [done for done, _, _ in told] == list(range(1, 9)) and {total for _, total, _ in told} == {8}
    assert [left for *_, left in told] == [None, None, *(27.0 * n for n in (5, 4, 3, 2, 1, 0))]


def test_a_step_is_timed_by_itself(llama_source, monkeypatch, fake_clock):
    """A model that takes a second for each token it is given."""
    model = awq_core.load(llama_source)
    forward = model.forward

    def slow(input_ids, **rest):
        fake_clock.pass_(input_ids.shape[1])
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", slow)
    run = timed_run(model, random_prompt(torch.arange(128), 1, 9), 4)
    assert (run.first, run.steps) == (9.0, (1.0, 1.0, 1.0)), "the cache is not used, or times run into one another"


def test_json(awq, read_json, quantized, llama_source):
    data = read_json(awq("bench", quantized, "--against", llama_source, *SHORT, "--threads", 1, "--json"))
    assert data["against"] == str(llama_source) and data["threads"] == 1 and data["fused"] is False
    assert sum(data["kernels"].values()) == 14 and data["dtypes"] == ["float32", "float32"]
    assert [(p["batch"], p["context"]) for p in data["points"]] == [(1, 5), (1, 12), (2, 5), (2, 12)]
    for point in data["points"]:
        assert len(point["speeds"]) == 2 and set(point["ratio"]) == {"prefill", "decode", "memory"}
        assert min(point["ratio"].values()) > 0
        for figures in point["speeds"]:
            assert min(figures.values()) > 0
            tokens = point["batch"] * point["context"]
            # Two rounds: the mean of two reciprocals is at least the reciprocal of their mean.
            assert figures["prefill_tokens_per_second"] >= tokens / figures["first_token_seconds"] * 0.999


def test_fused(awq, read_json, quantized):
    options = ["--batch", 1, "--context", 4, "--new", 2, "--rounds", 1, "--device", "cpu", "--json"]
    with_, without = (read_json(awq("bench", quantized, *fuse, *options)) for fuse in (["--fuse"], []))
    assert with_["fused"] and not without["fused"] and len(with_["points"]) == 1


def test_one_model_alone(awq, read_json, quantized):
    result = awq("bench", quantized, "--batch", 1, "--context", 4, "--new", 2, "--rounds", 1, "--json")
    data = read_json(result)
    (point,) = data["points"]
    (figures,) = point["speeds"]
    assert data["against"] is None and point["ratio"] is None
    assert figures["prefill_tokens_per_second"] == pytest.approx(4 / figures["first_token_seconds"])


def test_table(awq, quantized, llama_source):
    lines = awq("bench", quantized, "--against", llama_source, *SHORT).stdout.splitlines()
    assert re.match(r"float32 against float32, 14 linears on kernel \w+, cpu, \d+ threads$", lines[0])
    assert lines[1].startswith("4 new tokens, median of 2 rounds")
    assert lines[2].split() == ["batch", "context", "first", "token", "prefill", "decode", "memory"]
    rows = [line.split() for line in lines[3:]]
    assert len(rows) == 4 * 3
    assert rows[0][:3] == ["1", "5", "quantized"] and rows[1][0] == "source" and rows[2][0] == "ratio"
    assert all(re.fullmatch(r"\d+\.\d\dx", word) for word in rows[2][1:]) and len(rows[2]) == 5
    assert len({len(line) for line in lines[2:]}) == 1, "columns are not aligned"


def test_the_forced_kernel_is_the_models_and_not_the_originals(awq, read_json, quantized, monkeypatch):
    seen = []
    load = awq_core.load

    def watching(*arguments, **options):
        seen.append(os.environ.get("AWQ_KERNEL"))
        return load(*arguments, **options)

    monkeypatch.setattr(awq_core, "load", watching)
    options = ["--batch", 1, "--context", 4, "--new", 2, "--rounds", 1, "--kernel", "reference", "--json"]
    data = read_json(awq("bench", quantized, "--against", quantized, *options))
    assert data["kernels"] == {"reference": 14} and seen == ["reference", None]
    assert "AWQ_KERNEL" not in os.environ


def test_progress_in_a_log(awq, quantized, monkeypatch):
    """A line every ten seconds, with the time left once every shape has run."""
    import awq_core.cli.progress as progress

    ticks = iter(range(0, 1000, 7))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    result = awq("bench", quantized, "--batch", 1, "--context", "4,5", "--new", 2, "--rounds", 2)
    lines = [line for line in result.errors if line.startswith("runs ")]
    assert lines and all(re.fullmatch(r"runs \d/6  (warming up|\d+(\.\d)? m?s left)", line) for line in lines)
    assert "left" in lines[-1]


# -- the picture


@pytest.mark.parametrize("alone", [True, False])
def test_plot(awq, quantized, llama_source, tmp_path, alone):
    pytest.importorskip("matplotlib")
    against = [] if alone else ["--against", llama_source]
    options = ["--batch", "1,2", "--context", 4, "--new", 2, "--rounds", 1, "--plot", tmp_path / "speed.svg"]
    awq("bench", quantized, *against, *options)
    text = (tmp_path / "speed.svg").read_text()
    assert text.count(">1 x 4<") == 2 == text.count(">2 x 4<") and "decode, tokens a second" in text
    assert len(re.findall(r">\d+\.\d\dx<", text)) == (0 if alone else 4)
    assert "#ffffff" not in text and "#000000" not in text.replace("stroke: #000000; stroke-opacity: 0", "")


def test_plot_is_refused_before_anything_runs(awq, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(awq_core, "load", lambda *_, **__: pytest.fail("it ran"))
    pytest.importorskip("matplotlib")
    assert "no such format" in awq("bench", quantized, "--plot", tmp_path / "speed.odt", code=2).errors[-1]
    assert "no such folder" in awq("bench", quantized, "--plot", tmp_path / "none" / "a.svg", code=2).errors[-1]


def test_plot_without_matplotlib(awq, quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(awq_core, "load", lambda *_, **__: pytest.fail("it ran"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    line = awq("bench", quantized, "--plot", tmp_path / "speed.svg", code=2).errors[-1]
    assert line == 'awq: error: --plot needs matplotlib - try: pip install "awq-core[plots]"'


# -- failures


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--context", 2040, "--new", 9], "context and new tokens are 2049, the model holds 2048"),
        (["--batch", "1;4"], "'1;4' is not a list of numbers, such as 1,4"),
        (["--batch", 0], "'0' is not a list of numbers"),
        (["--new", 1], "--new"),
        (["--kernel", "abacus"], "AWQ_KERNEL=abacus: no such backend"),
    ],
)
def test_usage(awq, quantized, options, words):
    assert words in awq("bench", quantized, *options, code=2).errors[-1]


def test_failures(awq, quantized, llama_source, llama_config, tmp_path):
    from awq_core.testing import save_tiny

    assert "no such model folder" in awq("bench", tmp_path / "none", code=1).errors[-1]
    assert "has no 4-bit linears" in awq("bench", llama_source, "--kernel", "reference", code=2).errors[-1]
    save_tiny(llama_config(vocab_size=96), tmp_path / "other")
    line = awq("bench", quantized, "--against", tmp_path / "other", code=2).errors[-1]
    assert "vocabularies of 96 and 128 tokens" in line


def test_a_model_without_a_cache(llama_source, monkeypatch, one_line):
    model = awq_core.load(llama_source)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **options: forward(**{**options, "use_cache": False}))
    with pytest.raises(awq_core.AwqError) as caught:
        timed_run(model, torch.zeros(1, 3, dtype=torch.int64), 2)
    one_line(caught.value, "returns no cache")


def test_every_option_is_described():
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")
    for param in bench.params:
        for option in param.opts if isinstance(param, click.Option) else ():
            assert f"`{option}" in text, option
