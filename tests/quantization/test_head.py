"""The output head, quantized on request: numbers against a walk over every token, tied and untied, killed or not."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import awq_core
from awq_core import QuantConfig, output_head
from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.trace import record, replay
from awq_core.checkpoint.pack import dequantize, unpack
from awq_core.cli.plan_text import describe
from awq_core.config import ROUNDINGS
from awq_core.errors import ConfigError, PlanError
from awq_core.hooks import Architecture, LayerStack, hookimpl
from awq_core.hooks.manager import PluginManager
from awq_core.output_head import chunk_rows, untied
from awq_core.plan_types import HeadPlan, LinearPlan
from awq_core.quantization import codes
from awq_core.quantization.head import quantize_head
from awq_core.quantization.rounding import Grid, round_trip
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load
from awq_core.testing import save_tiny

GROUP = 32
WINDOWS = torch.randint(8, 100, (4, 24), generator=torch.Generator().manual_seed(0))
HEAD = QuantConfig(group_size=GROUP, rounding="nearest", lm_head=True)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory, llama_config, tied):
    folder = tmp_path_factory.mktemp("head") / "source"
    save_tiny(llama_config(tie_word_embeddings=tied), folder)
    return folder


def run(source, out, config=HEAD, **options):
    options = {"calibration": WINDOWS.tolist(), "samples": 4, "seq_len": 24, **options}
    return awq_core.quantize(source, out, config=config, **options)


@pytest.fixture(scope="module")
def made(source):
    out = source.parent / "made"
    return out, run(source, out)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written(source, made, tied, tmp_path):
    out, result = made
    run(source, tmp_path / "plain", replace(HEAD, lm_head=False))
    plain, written = tensors(tmp_path / "plain"), tensors(out)
    heads = {f"lm_head.{part}" for part in ("qweight", "qzeros", "scales")}
    assert written.keys() == (plain.keys() - {"lm_head.weight"}) | heads
    assert all(torch.equal(plain[name], written[name]) for name in plain.keys() & written.keys())
    assert torch.equal(written[EMBEDDING], tensors(source)[EMBEDDING])
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "plain", out))
    assert before["tie_word_embeddings"] is tied and after["tie_word_embeddings"] is False
    assert after["quantization_config"] == {**before["quantization_config"], "lm_head": True} | {
        "modules_to_not_convert": []
    }
    assert before["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    card = (out / "README.md").read_text()
    assert "`lm_head` is 4-bit" in card and "random numbers" in card
    assert "random numbers" not in (tmp_path / "plain" / "README.md").read_text()
    assert [report.name for report in result.reports][-1] == "lm_head"


def test_it_loads_and_answers_as_the_fake_quantized_model(made):
    out, _ = made
    model, fake = load(out), load(out, fake_quant=True)
    assert isinstance(model.lm_head, QuantLinear) and isinstance(fake.lm_head, nn.Linear)
    assert fake.lm_head.weight is not fake.model.embed_tokens.weight
    with torch.no_grad():
        got, want = (m(input_ids=WINDOWS).logits for m in (model, fake))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(WINDOWS[:1], **options), fake.generate(WINDOWS[:1], **options))


def head_inputs(model, batches):
    """What a loaded model's head reads, token by token, padding left out; fp64 `[tokens, hidden]`."""
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() if "attention_mask" in batch else ... for batch in batches]
    return torch.cat([x[mask].flatten(0, -2) for x, mask in zip(seen, masks, strict=True)])


@pytest.mark.parametrize("kept", [(), ("layers.1.",), ("layers.",)], ids=["none", "last", "all"])
@pytest.mark.parametrize("padded", [False, True])
def test_losses_are_those_of_what_the_finished_model_feeds_it(source, tmp_path, kept, padded):
    weight = load(source).lm_head.weight.detach().double()
    batches = [{"input_ids": part} for part in WINDOWS.split(2)]
    if padded:
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[0, :7] = 0
        batches[1]["attention_mask"] = mask
    data = CalibrationData(tuple(batches), "windows", 4, WINDOWS.numel() - 7 * padded)
    config = replace(HEAD, modules_to_not_convert=kept, clip="asymmetric")
    result = run(source, tmp_path / "out", config, calibration=data)
    report = result.reports[-1]
    model = load(tmp_path / "out", fake_quant=True)
    x = head_inputs(model, batches)
    assert report.tokens == len(x) == data.tokens and report.clipped > 0

    def loss(rounded):
        return float((x @ (rounded.double() - weight).T).square().mean())

    nearest = round_trip(weight.float(), GROUP, torch.float16)
    assert report.loss_rtn == pytest.approx(loss(nearest), rel=1e-3)
    assert report.loss == pytest.approx(loss(model.lm_head.weight), rel=1e-3)
    assert report.loss < report.loss_rtn


def test_round_to_nearest_needs_no_calibration(source, tmp_path):
    config = replace(HEAD, scale=False, clip="none")
    result = run(source, tmp_path / "out", config, calibration=None)
    assert result.calibration is None and result.reports[-1].loss is None
    weight = load(source).lm_head.weight.detach()
    assert torch.equal(load(tmp_path / "out", fake_quant=True).lm_head.weight, round_trip(weight, GROUP, torch.float16))


# -- row chunks -------------------------------------------------------------------------------------------------------


def test_chunks_are_whole_multiples_of_what_is_worked_at_once():
    assert output_head.WORKED_AT_ONCE == codes.CHUNK_ELEMENTS
    for out, width in ((151_936, 8192), (32_000, 4096), (128_256, 5120), (4096, 256), (48, 32)):
        at_once = max(1, codes.CHUNK_ELEMENTS // width)
        for chunks in (0, 1, 2, 3, 7, 100, 10**6):
            rows = chunk_rows(out, width, chunks)
            assert 1 <= rows <= out
            assert rows == out or rows % at_once == rows % 8 == 0
            assert not chunks or -(-out // rows) <= chunks
    assert 4 * chunk_rows(151_936, 8192) * 8192 <= 512 << 20
    assert chunk_rows(151_936, 8192, 1) == 151_936
    assert chunk_rows(151_936, 8192, 10**6) * 8192 <= 8 * codes.CHUNK_ELEMENTS


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_the_number_of_chunks_changes_no_code(monkeypatch, generator, statistics, rounding, calibrated):
    """Rows worked at once are made few, so that there are many chunks of a small head, the last of them short."""
    monkeypatch.setattr(codes, "CHUNK_ELEMENTS", 24 * 64)
    monkeypatch.setattr(output_head, "WORKED_AT_ONCE", 24 * 64)
    weight = torch.randn(200, 64, generator=generator)
    linear = LinearPlan("head", 64, 200, bias=False, quantize=True, group_size=GROUP)
    config = QuantConfig(group_size=GROUP, rounding=rounding)
    known = statistics if calibrated else None
    found, sizes = [], []
    for chunks in (1, 2, 3, 9):
        asked = []

        def read(start, end, asked=asked):
            asked.append(end - start)
            return weight[start:end].clone()

        head = HeadPlan(linear, "", chunk_rows(200, 64, chunks))
        found.append(quantize_head(head, read, known, config, torch.float16))
        assert sum(asked) == 200
        sizes.append(len(asked))
    assert sizes == [1, 2, 3, 9]
    whole = codes.choose(weight, known, GROUP, torch.float16, config)
    for packed, report in found:
        assert torch.equal(unpack(packed.qweight).T, whole.codes)
        assert torch.equal(packed.qweight, found[0][0].qweight) and torch.equal(packed.qzeros, found[0][0].qzeros)
        assert torch.equal(packed.scales, found[0][0].scales)
        assert report.clipped == pytest.approx(whole.clipped) and report.flipped == pytest.approx(whole.flipped)
        if calibrated:
            assert report.loss == pytest.approx(float(whole.loss.mean())) and report.loss <= report.loss_rtn * 1.0001
        else:
            assert report.loss is None and report.tokens == 0


@pytest.fixture
def statistics(generator):
    from awq_core.calibration.statistics import Sums

    sums = Sums.zeros(64, torch.device("cpu"))
    sums.add(torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator) + 0.2)
    return sums.finish("x")


def test_a_known_grid_is_taken_chunk_by_chunk(monkeypatch, generator):
    monkeypatch.setattr(output_head, "WORKED_AT_ONCE", 8 * 64)
    weight = torch.randn(40, 64, generator=generator)
    grid = Grid(torch.rand(40, 2, generator=generator).half().float() + 0.1, torch.randint(0, 16, (40, 2)).float())
    linear = LinearPlan("head", 64, 40, bias=False, quantize=True, group_size=GROUP)
    head = HeadPlan(linear, "", chunk_rows(40, 64, 5))
    assert head.rows == 8
    read = lambda start, end: weight[start:end]  # noqa: E731
    packed, report = quantize_head(head, read, None, HEAD, torch.float16, known=grid)
    assert torch.equal(packed.scales.float().T, grid.step.half().float())
    step, zero = (part.repeat_interleave(GROUP, dim=1) for part in (grid.step.half().float(), grid.zero))
    want = ((weight / grid.step.repeat_interleave(GROUP, 1)).round() + zero).clamp(0, 15)
    assert torch.equal(dequantize(packed), (want - zero) * step) and report.clipped == 0


def test_chunks_asked_for_by_a_run(source, made, tmp_path):
    out, _ = made
    run(source, tmp_path / "out", replace(HEAD, lm_head_chunks=5))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


# -- long runs --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_stopped_before_or_after_the_head_ends_in_the_same_bytes(source, made, tmp_path, steps):
    def progress(event):
        if getattr(event, "done", 0) >= steps:
            assert event.total == 3 and event.path == ("model.layers.0", "model.layers.1", "lm_head")[event.done - 1]
            raise Stop

    with pytest.raises(Stop):
        run(source, tmp_path / "out", progress=progress)
    again = run(source, tmp_path / "out")
    out, whole = made
    assert again.reports == whole.reports
    assert contents(tmp_path / "out") == contents(out)


def test_activations_on_disk_change_nothing(source, made, tmp_path):
    run(source, tmp_path / "out", offload=tmp_path)
    assert contents(tmp_path / "out") == contents(made[0])


def test_reuse(source, made, tmp_path):
    out, _ = made
    again = run(source, tmp_path / "again", reuse=out, calibration=None)
    assert again.calibration is None
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    # An earlier run that kept its head has no ranges for it: they are searched, the rest is taken.
    plain = replace(HEAD, lm_head=False)
    run(source, tmp_path / "plain", plain)
    searched = run(source, tmp_path / "searched", reuse=tmp_path / "plain")
    assert searched.calibration is not None
    assert (tmp_path / "searched" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    # And one that quantized it serves a run that keeps it.
    run(source, tmp_path / "kept", plain, reuse=out)
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan(source, made, tied):
    out, _ = made
    decided = awq_core.plan(source, config=HEAD)
    linear = decided.head.linear
    assert linear.name == "lm_head" and linear.quantize and linear in decided.outside
    assert decided.head.tied == (EMBEDDING if tied else "")
    assert decided.kept_prefixes() == []
    lines = list(describe(decided))
    told = lines[lines.index("output head") + 1]
    assert told.startswith("  lm_head: 4 bits in groups of 32, worked in 1 row chunk")
    assert ("untied from model.embed_tokens.weight" in told) is tied and "kept linears" not in lines
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors(out).values())
    assert decided.bytes_after == stored
    before = sum(tensor.numel() * tensor.element_size() for tensor in tensors(source).values())
    assert decided.bytes_before == before
    assert awq_core.plan(source, config=replace(HEAD, lm_head=False)).head is None


def test_memory_goes_with_the_chunks(tmp_path, llama_config):
    config = llama_config(hidden_size=1024, vocab_size=65_536, num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    whole, some, kept = (
        awq_core.plan(tmp_path, config=QuantConfig(**options)).peak_bytes
        for options in (
            {"lm_head": True, "lm_head_chunks": 1},
            {"lm_head": True, "lm_head_chunks": 16},
            {},
        )
    )
    assert whole - some == (65_536 - 4096) * 1024 * (4 + 4 + 1)
    assert kept <= some < whole


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({"vocab_size": 130}, {}, ("lm_head", "130 outputs", "multiple of 8")),
        (
            {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
            {"group_size": 64},
            ("lm_head", "64"),
        ),
        ({}, {"modules_to_not_convert": ("lm_head",)}, ("lm_head", "asked for")),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, llama_config, one_line, options, config, words):
    save_tiny(llama_config(**options), tmp_path / "source")
    asked = replace(HEAD, **config)
    with pytest.raises(ConfigError) as caught:
        awq_core.plan(tmp_path / "source", config=asked)
    one_line(caught.value, *words)
    with pytest.raises(ConfigError):
        run(tmp_path / "source", tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_a_component_is_named_as_one(source, one_line):
    stacks = (LayerStack(component="language", blocks="model.layers"), LayerStack(component="head", blocks="lm_head"))

    class Plugin:
        @hookimpl
        def awq_architectures(self):
            return (Architecture(family="acorn", model_types=("llama",), stacks=stacks),)

    manager = PluginManager(allow=())
    manager.register(Plugin(), "acorn")
    with pytest.raises(ConfigError) as caught:
        awq_core.plan(source, config=HEAD, manager=manager)
    one_line(caught.value, "lm_head", "--component")


def test_a_model_whose_head_cannot_be_untied_is_refused(source, tied, monkeypatch, one_line):
    if not tied:
        pytest.skip("has a weight of its own")
    from transformers import LlamaForCausalLM

    def always(self, *args, **kwargs):
        self.lm_head.weight = self.model.embed_tokens.weight

    monkeypatch.setattr(LlamaForCausalLM, "tie_weights", always)
    with pytest.raises(ConfigError) as caught:
        awq_core.plan(source, config=HEAD)
    one_line(caught.value, "is the embedding table", "LlamaForCausalLM")


def test_no_head(source):
    linears = ()
    with pytest.raises(ConfigError, match="no linear output head"):
        output_head.plan_head(nn.Linear(2, 2), linears, (), HEAD)
    assert output_head.plan_head(nn.Linear(2, 2), linears, (), QuantConfig()) is None


def test_untied_reaches_the_configuration_of_the_language_model():
    class Part:
        tie_word_embeddings = True

    class Other:
        pass

    class Whole:
        sub_configs = {"text_config": Part, "vision_config": Other, "absent": Part}  # noqa: RUF012
        text_config, vision_config, absent = Part(), Other(), None

    raw = {"text_config": {"hidden_size": 8}, "vision_config": {"depth": 2}, "model_type": "x"}
    assert untied(raw, Whole()) == {
        "text_config": {"hidden_size": 8, "tie_word_embeddings": False},
        "vision_config": {"depth": 2},
        "model_type": "x",
        "tie_word_embeddings": False,
    }
    assert raw["text_config"] == {"hidden_size": 8}


# -- from the end of a stack to the head ------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, as_tuple):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states, **kwargs):
        return (hidden_states * 2,) if self.as_tuple else hidden_states * 2


class Model(nn.Module):
    """Something is added after each block, and something else is done before the head."""

    def __init__(self, as_tuple, calls_head=True):
        super().__init__()
        self.blocks = nn.ModuleList([Block(as_tuple) for _ in range(2)])
        self.head, self.calls_head, self.as_tuple = nn.Identity(), calls_head, as_tuple

    def forward(self, x, use_cache=False, attention_mask=None):
        for block in self.blocks:
            x = block(x)[0] if self.as_tuple else block(x)
            x = x + 1
        return SimpleNamespace(logits=self.head(x.tanh() * 3) if self.calls_head else x)


@pytest.mark.parametrize("as_tuple", [False, True])
def test_replay_gives_the_head_what_the_model_would(as_tuple):
    batches = [{"x": torch.randn(2, 3, 4)}, {"x": torch.randn(1, 5, 4), "attention_mask": torch.ones(1, 5)}]
    model = Model(as_tuple)
    inputs = record(model, list(model.blocks), batches)
    inputs.feeds = True
    for index, block in enumerate(model.blocks):
        inputs.advance(index, block)
    seen = list(replay(model, list(model.blocks), inputs, batches, model.head))
    assert len(seen) == 2 and seen[0][1] is None and seen[1][1].dtype is torch.bool
    for batch, (hidden, _) in zip(batches, seen, strict=True):
        torch.testing.assert_close(hidden, model(**batch).logits)
    assert "forward" not in vars(model.head) and "forward" not in vars(model.blocks[0])
    silent = Model(as_tuple, calls_head=False)
    with pytest.raises(PlanError, match="does not call"):
        list(replay(silent, list(silent.blocks), inputs, batches, silent.head))
