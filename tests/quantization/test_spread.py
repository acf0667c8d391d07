"""Work that is spread: every byte as in one thread, results in order, few items at once."""

import threading
from dataclasses import dataclass

import pytest
import torch

import awq_core
from awq_core import QuantConfig
from awq_core.calibration.statistics import Statistics
from awq_core.devices import pick_devices
from awq_core.errors import ConfigError, NumericsError
from awq_core.quantization import scales
from awq_core.quantization.engines import spreading
from awq_core.quantization.linear import Pending, rtn_loss
from awq_core.quantization.spread import here, in_order, moved, threads, with_tensors
from awq_core.testing.tiny import save_tiny

CPU = torch.device("cpu")
CONFIGS = {
    "default": QuantConfig(group_size=32),
    "bias": QuantConfig(group_size=32, rounding="greedy", correct_bias=True),
    "salience": QuantConfig(group_size=32, rounding="heuristic"),
}


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_options):
    """A dense model whose q, k and v have biases, and a mixture."""
    from transformers import MixtralConfig, Qwen2Config

    folder = tmp_path_factory.mktemp("sources")
    save_tiny(Qwen2Config(**tiny_options), folder / "dense")
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=3, num_experts_per_tok=1), folder / "mixture")
    return folder


@pytest.mark.parametrize("model", ["dense", "mixture"])
@pytest.mark.parametrize("config", CONFIGS)
def test_two_devices_give_the_bytes_of_one(sources, tmp_path, corpus, model, config):
    options = {"config": CONFIGS[config], "calibration": list(corpus), "samples": 4, "seq_len": 32}
    one = awq_core.quantize(sources / model, tmp_path / "one", device="cpu", **options)
    two = awq_core.quantize(sources / model, tmp_path / "two", device="cpu,cpu", **options)
    assert two.reports == one.reports
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_groups_searched_together_find_what_each_finds_alone():
    """Wide enough that candidates are screened on some rows, and rescored on all."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for rows in ((600, 40), (48,), (1200,)):
        x = torch.randn(200, 64, generator=generator) * torch.rand(64, generator=generator).exp()
        statistics = Statistics(200, x.T @ x / 200, x.abs().mean(0), x.mean(0))
        weights = tuple(Pending(torch.randn(n, 64, generator=generator).bfloat16()) for n in rows)
        groups.append(scales.Readers(weights, statistics, 32))
    alone = [scales.search(group.weights, group.statistics, 32, torch.float16) for group in groups]
    with threads([CPU, CPU]) as spread:
        together = scales.search_all(groups, torch.float16, spread=spread)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.scale, other.scale)
        assert (one.family, one.loss, one.losses_rtn) == (other.family, other.loss, other.losses_rtn)
        assert one.loss < one.loss_identity
    for group, one in zip(groups, alone, strict=True):
        for weight, loss in zip(group.weights, one.losses_rtn, strict=True):
            assert loss == pytest.approx(rtn_loss(weight, group.statistics, 32, torch.float16), rel=1e-5)


def test_each_device_works_at_the_same_time_and_results_are_in_order():
    together = threading.Barrier(3, timeout=30)  # broken, unless three items are worked at once

    def work(item):
        together.wait()
        return item * 2

    with threads([CPU] * 3) as spread:
        assert list(spread(work, range(9))) == [2 * item for item in range(9)]


def test_few_items_are_made_before_their_turn():
    made = []

    def items():
        for item in range(20):
            made.append(item)
            yield item

    results = in_order(lambda item: lambda: item, items(), ahead=3)
    for taken, result in enumerate(results):
        assert result == taken
        assert len(made) <= taken + 1 + 3
    assert len(made) == 20


def test_an_error_in_a_thread_is_the_error_of_the_run():
    def fail(item):
        raise NumericsError(f"item {item}", hint="look")

    with threads([CPU, CPU]) as spread, pytest.raises(NumericsError, match=r"item 0 \(look\)"):
        list(spread(fail, range(5)))


@dataclass(frozen=True)
class Inner:
    tensors: tuple[torch.Tensor, ...]
    name: str = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    maybe: torch.Tensor | None
    pair: tuple[int, list[torch.Tensor]]


def test_every_tensor_of_a_value_is_changed_and_nothing_else():
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    value = Outer(Inner((one, two)), None, (5, [three]))
    found = with_tensors(value, lambda tensor: len(tensor))
    assert found == Outer(Inner((1, 2)), None, (5, [3]))
    assert with_tensors(found, lambda number: number + 1, int) == Outer(Inner((2, 3)), None, (6, [4]))
    same = moved(value, CPU)
    assert same.inner.tensors[0] is one and same.pair[1][0] is three  # nothing is copied where it is


def test_the_engine_and_its_arguments_are_checked():
    with spreading("local", None, [CPU]) as spread:
        assert spread is here
    for arguments in (("spark", None, [CPU]), ("local", "auto", [CPU]), ("ray", None, [CPU, CPU])):
        with pytest.raises(ConfigError) as caught:
            spreading(*arguments)
        assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cpu,", ",cpu", "cpu,,cpu", "auto,cpu", "cpu,nowhere", "cpu,meta", "cpu;cpu"])
def test_devices_that_cannot_be_are_refused_in_one_line(device):
    with pytest.raises(ConfigError) as caught:
        pick_devices(device)
    assert repr(device.split(",")[-1]) in str(caught.value) or repr(device) in str(caught.value)
    assert caught.value.hint and "\n" not in str(caught.value)


def test_devices_are_read():
    assert pick_devices("cpu") == [CPU]
    assert pick_devices("cpu, cpu") == [CPU, CPU]
    assert len(pick_devices("auto")) == 1
