"""Calibration in shards: sums that add up, blocks that travel, and the same bytes wherever a shard is worked."""

import copy
import json
import pickle
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import awq_core
from awq_core import QuantConfig
from awq_core.calibration.stack import at_once
from awq_core.calibration.statistics import Sums
from awq_core.calibration.trace import record
from awq_core.errors import ConfigError
from awq_core.quantization import shards
from awq_core.quantization.shards import Portable, can_be_sent, sharded
from awq_core.quantization.spread import here, threads
from awq_core.testing.tiny import save_tiny

CPU = torch.device("cpu")
# Five batches of eight windows: three shards are one batch, and twice two.
SAMPLES = {"samples": 40, "seq_len": 16}


@pytest.mark.parametrize(("batches", "count"), [(16, 4), (17, 4), (3, 2), (3, 8), (1, 1), (0, 3)])
def test_shards_are_neighbours_and_all_of_one_size(batches, count):
    found = shards.shards(batches, count)
    assert [number for part in found for number in part] == list(range(batches))
    assert len(found) == max(1, min(batches, count))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_sums_of_parts_are_those_of_the_whole(generator):
    x, gate = torch.randn(90, 7, generator=generator), torch.rand(90, generator=generator).round(decimals=1)
    whole, parts = Sums.zeros(7, CPU), [Sums.zeros(7, CPU) for _ in range(3)]
    plain = Sums.zeros(7, CPU)
    plain.add(x)
    whole.add(x, gate=gate)
    for part, rows, gates in zip(parts, x.split(40), gate.split(40), strict=True):
        part.add(rows, gate=gates)
    for part in parts[1:]:
        parts[0].merge_(part)
    one, other = whole.finish("x"), parts[0].finish("x")
    w = gate.double().square()
    expected = (x.double() * w[:, None]).T @ x.double() / w.sum()
    torch.testing.assert_close(other.gram.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.gram, other.gram)
    torch.testing.assert_close(one.mean_abs, other.mean_abs)
    torch.testing.assert_close(one.mean, other.mean)
    assert other.n == one.n == int((gate != 0).sum())
    assert other.n_effective == pytest.approx(float(w.sum() ** 2 / w.square().sum()))
    plain.merge_(Sums.zeros(7, CPU))
    assert plain.n == 90 and not plain.weighted


class Tied(nn.Module):
    """Two linears with one weight, a buffer, and a forward that reads all of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.arange(6.0))
        self.register_buffer("empty", None)

    def forward(self, hidden_states):
        return self.second(self.first(hidden_states)) + self.offset


def test_a_block_travels_and_is_its_own_afterwards():
    block, x = Tied(), torch.randn(2, 3, 6)
    before = copy.deepcopy(block.state_dict())
    value = Portable.of(block)
    assert all(tensor.is_meta for tensor in (*value.module.parameters(), *value.module.buffers()))
    assert value.tensors[0].data_ptr() == block.first.weight.data_ptr(), "nothing is copied"
    arrived = replace(value, module=pickle.loads(pickle.dumps(value.module)))
    tensors = tuple(tensor.clone() for tensor in value.tensors)
    for made in (value.restored(), replace(arrived, tensors=tensors).restored()):
        assert torch.equal(made(x), block(x)) and made.second.weight is made.first.weight
        made.train(False)
    assert block.training and all(torch.equal(block.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad for parameter in block.parameters())


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, hidden_states, mask=None, shared=None):
        return (hidden_states + self.weight, mask)


class Stack(nn.Module):
    """Adds something of its own between its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Adding(), Adding()])

    def forward(self, x, use_cache=False, **more):
        for block in self.blocks:
            x = block(x + 10, mask=x > 0, **more)[0]
        return x


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("devices", [0, 2])
def test_blocks_are_advanced_batch_by_batch(count, devices):
    model = Stack()
    batches = [{"x": torch.full((2, 3, 1), float(number))} for number in range(5)]
    inputs = record(model, list(model.blocks), batches)
    inputs.feeds = True
    inputs.fork()
    inputs.original = [100 * kept for kept in inputs.original]
    with threads([CPU] * devices) if devices else nullcontext(here) as spread:
        run = sharded(count, spread)
        for index, block in enumerate(model.blocks):
            inputs.advance_original(index, block, run)
            inputs.advance(index, block, run)
    assert [kept.unique().tolist() for kept in inputs.hidden] == [[number + 22.0] for number in range(5)]
    assert [kept.unique().tolist() for kept in inputs.original] == [[100 * (number + 10) + 11.0] for number in range(5)]
    assert inputs.members == 2


def test_blocks_that_share_a_mapping_or_came_with_a_folder_stay_here(monkeypatch):
    model = Stack()
    plain = record(model, list(model.blocks), [{"x": torch.ones(1, 1, 1)}])
    shared = record(model, list(model.blocks), [{"x": torch.ones(1, 1, 1), "shared": {}}])
    block = model.blocks[0]
    assert can_be_sent(block, plain.batches(0)) and not can_be_sent(block, shared.batches(0))
    monkeypatch.setattr(Adding, "__module__", "transformers_modules.acorn.modeling")
    assert not can_be_sent(block, plain.batches(0))

    def nobody(function, items):
        raise AssertionError("sent away")

    run = sharded(2, nobody)
    with pytest.raises(AssertionError):
        monkeypatch.undo()
        plain.advance(0, block, run)
    shared.advance(0, block, run)
    assert float(shared.hidden[0]) == 22


def test_one_shard_is_no_detour_and_none_is_refused():
    assert sharded(1) is at_once
    with pytest.raises(ConfigError, match="0 shards"):
        sharded(0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_options):
    from transformers import MixtralConfig, Qwen2Config

    folder = tmp_path_factory.mktemp("sources")
    save_tiny(Qwen2Config(**tiny_options), folder / "dense")
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=3, num_experts_per_tok=1), folder / "mixture")
    return folder


def contents(folder, *but):
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.parametrize("model", ["dense", "mixture"])
def test_who_works_a_shard_changes_no_byte(sources, tmp_path, corpus, model, monkeypatch):
    worked = []
    original = shards.work

    def noted(item):
        worked.append(item.function.__name__)
        return original(item)

    monkeypatch.setattr(shards, "work", noted)
    quantize = partial(
        awq_core.quantize, sources / model, config=QuantConfig(group_size=32), calibration=list(corpus), **SAMPLES
    )
    whole = quantize(tmp_path / "whole")
    one = quantize(tmp_path / "one", calib_shards=3)
    assert not worked
    two = quantize(tmp_path / "two", calib_shards=3, device="cpu,cpu")
    # Of two blocks: drift, a pass or, of the mixture, two, and the first one's outputs; three shards of each.
    passes = {"dense": 1, "mixture": 2}[model]
    assert sorted(worked) == sorted(3 * (2 * ["apart"] + 2 * passes * ["observe"] + ["_forward"]))
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and two.reports == one.reports
    (tmp_path / "disk").mkdir()
    quantize(tmp_path / "three", calib_shards=3, offload=tmp_path / "disk")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    for report, other in zip(whole.reports, one.reports, strict=True):
        assert report.tokens == other.tokens and report.loss_rtn == pytest.approx(other.loss_rtn, rel=1e-4)
    assert "calib_shards: 3\n" in (tmp_path / "one" / "recipe.yaml").read_text()


def test_the_number_of_shards_is_part_of_a_run(sources, tmp_path, corpus, monkeypatch):
    from awq_core.errors import OutputError
    from awq_core.quantization.engine import Engine

    def stop(*arguments):
        raise KeyboardInterrupt

    quantize = partial(
        awq_core.quantize,
        sources / "dense",
        tmp_path / "out",
        config=QuantConfig(group_size=32),
        calibration=list(corpus),
        **SAMPLES,
    )
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "_hand_on", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(calib_shards=2)
    with pytest.raises(OutputError, match="calib_shards"):
        quantize(calib_shards=3)
    quantize(calib_shards=2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 4
