"""Mixtures are observed some experts at a time: the same bytes, and no more Gram matrices than were planned."""

import weakref

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig

from awq_core import api, passes
from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.statistics import Statistics, Sums
from awq_core.config import QuantConfig
from awq_core.modules import UnstackedExperts
from awq_core.quantization import collect
from awq_core.testing import TINY_DECODER
from awq_core.testing.tiny import save_tiny

TINY = {**TINY_DECODER, "num_key_value_heads": 4}
PLAIN = QuantConfig(group_size=32)
DOWN, NORM = 96 * 96 * 4, 64 * 64 * 4  # bytes of the Gram matrices of one `down` and of a norm's readers
EXPERT = 2 * DOWN + NORM  # its `down` over all tokens and over its own, its gate and up over its own
EVERYTHING = 1 << 40


def mixture(experts=6, **options):
    return MixtralConfig(**{**TINY, "num_local_experts": experts, "num_experts_per_tok": 2, **options})


def shared_expert():
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    return Qwen2MoeConfig(**TINY, **experts, shared_expert_intermediate_size=128)


def block_of(folder, config):
    if not folder.exists():
        save_tiny(config, folder)
    return api.plan(folder, config=PLAIN).blocks[0]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@pytest.fixture
def quantized(tmp_path, generator, monkeypatch):
    """`quantized(config, chunk_bytes)`: what is written, and the reports."""
    ids = torch.randint(1, 127, (6, 40), generator=generator)
    batches = ({"input_ids": ids[:4]}, {"input_ids": ids[4:, :30]})

    def run(config, chunk_bytes, settings=PLAIN, reuse=None):
        source, out = tmp_path / "source", tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        if not source.exists():
            save_tiny(config, source)
        monkeypatch.setattr(passes, "CHUNK_BYTES", chunk_bytes)
        data = CalibrationData(batches, "test", 6, 220)
        result = api.quantize(source, out, config=settings, calibration=data, reuse=reuse)
        run.out = out
        return contents(out), result.reports

    return run


@pytest.mark.parametrize("config", [mixture, shared_expert])
@pytest.mark.parametrize("settings", [PLAIN, QuantConfig(group_size=32, scale=False)])
def test_one_expert_at_a_time_or_all_at_once_gives_the_same_bytes(quantized, config, settings):
    whole = quantized(config(), EVERYTHING, settings)
    assert quantized(config(), 1, settings) == whole
    assert quantized(config(), 3 * EXPERT, settings) == whole
    assert all(report.loss is not None and report.tokens == 220 for report in whole[1])


def test_scales_that_are_there_before_the_statistics_give_the_same_too(quantized):
    """An expert that is observed late finds the statistics it shares scaled already."""
    config = mixture(4, intermediate_size=128)
    quantized(config, EVERYTHING)
    first, finer = quantized.out, QuantConfig(group_size=64)
    whole, reports = quantized(config, EVERYTHING, finer, reuse=first)
    assert quantized(config, 1, finer, reuse=first) == (whole, reports)
    _, searched = quantized(config, EVERYTHING, finer)
    assert [one.family for one in reports if one.family != "none"].count("reused") == len(searched)
    pairs = list(zip(reports, searched, strict=True))
    for one, other in pairs[: len(pairs) // 2]:  # the second block's input depends on what the first became
        assert one.routed == other.routed and one.loss_rtn == pytest.approx(other.loss_rtn, rel=1e-3)


def test_experts_that_only_know_on_and_off_give_the_same_bytes(quantized, monkeypatch):
    """A plugin's own module may run all of its experts whenever `calibrating` is not empty."""
    chosen = quantized(mixture(), 3 * EXPERT)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if self.calibrating:
                rows = self.run_expert(expert, hidden_states)[token]
            else:
                rows = self.run_expert(expert, hidden_states[token])
            out.index_add_(0, token, rows * top_k_weights[token, slot, None])
        return out

    monkeypatch.setattr(UnstackedExperts, "forward", forward)
    assert quantized(mixture(), 3 * EXPERT) == chosen


@pytest.fixture
def alive(monkeypatch):
    """Keeps `alive["most"]`: the bytes of the Gram matrices that existed at the same time, sums included."""
    grams = weakref.WeakValueDictionary()
    counts = {"most": 0, "made": 0}

    class Counted(Sums):
        def __init__(self, gram, *rest):
            super().__init__(gram, *rest)
            self.nbytes = gram.nbytes
            self.note(self)

        def note(self, value):
            counts["made"] += 1
            grams[counts["made"]] = value
            sizes = (one.nbytes for one in grams.values())
            counts["most"] = max(counts["most"], sum(sizes))

        def finish(self, name):
            result = super().finish(name)
            self.nbytes = 0  # the matrix that is returned takes the place of the sum
            self.note(result.gram)
            return result

    with_own = Statistics.with_own

    def counted(self, s=None):
        result = with_own(self, s)
        if self.own is not None:
            counts["made"] += 1
            grams[counts["made"]] = result.gram
            counts["most"] = max(counts["most"], sum(one.nbytes for one in grams.values()))
        return result

    monkeypatch.setattr(collect, "Sums", Counted)
    monkeypatch.setattr(Statistics, "with_own", counted)
    return counts


@pytest.mark.parametrize(("chunk", "experts"), [(3 * EXPERT, 3), (1, 1), (EVERYTHING, 12)])
def test_no_more_gram_matrices_exist_than_were_planned(tmp_path, quantized, alive, monkeypatch, chunk, experts):
    quantized(mixture(12), chunk)
    assert alive["most"] == passes.gram_bytes(block_of(tmp_path / "source", mixture(12)))
    assert alive["most"] == experts * EXPERT + NORM  # the norm's is needed until the last `up` is rounded


def test_mixing_is_counted_where_it_needs_more_than_observing(tmp_path, quantized, alive):
    """Narrow experts: when gate and up are rounded, the `down` over all tokens is gone, and the mixed one is larger."""
    quantized(mixture(4, intermediate_size=32), 1)
    assert alive["most"] == passes.gram_bytes(block_of(tmp_path / "source", None)) == 3 * NORM + 32 * 32 * 4


def test_groups_are_searched_in_their_order_and_planned_so(tmp_path, quantized, alive):
    """The shared expert's `down` is observed first, and waits for the groups of all other experts."""
    quantized(shared_expert(), 2 * EXPERT)
    assert alive["most"] == passes.gram_bytes(block_of(tmp_path / "source", shared_expert()))
    assert alive["most"] == 2 * EXPERT + NORM + 128 * 128 * 4


def test_a_dense_block_drops_its_gram_matrices_with_the_last_group(tmp_path, quantized, alive):
    config = LlamaConfig(**TINY)
    quantized(config, 1)
    (one,) = passes.passes(block_of(tmp_path / "source", config))
    assert one.mixture is None
    assert alive["most"] == passes.gram_bytes(block_of(tmp_path / "source", config)) == 3 * NORM + DOWN


def test_everything_outside_first_then_chunks_of_experts(tmp_path, monkeypatch):
    block = block_of(tmp_path / "source", mixture(8))
    monkeypatch.setattr(passes, "CHUNK_BYTES", 3 * EXPERT)
    first, *rest = passes.passes(block)
    assert first.mixture is None and [site.width for site in first.sites] == [64, 64]
    assert all(one.mixture == "mlp.experts" for one in rest)
    assert [sorted(one.experts) for one in rest] == [["0", "1"], ["2", "3", "4"], ["5", "6", "7"]]
    assert len(rest[0].sites[0].readers) == 16  # gate and up of every expert read one tensor
    readers = [name for one in (first, *rest) for site in one.sites for name in site.readers]
    assert sorted(readers) == sorted(linear.name.removeprefix(block.path + ".") for linear in block.quantized)
    assert sorted(readers) == sorted(name for one in (first, *rest) for name in one.complete)
    assert [site.readers for site in rest[1].routed[:2]] == [
        ("mlp.experts.2.w1", "mlp.experts.2.w3"),
        ("mlp.experts.2.w2",),
    ]


def test_the_plan_counts_a_chunk_not_every_expert(tmp_path, monkeypatch):
    few, many = (block_of(tmp_path / str(count), mixture(count)) for count in (4, 24))
    monkeypatch.setattr(passes, "CHUNK_BYTES", 2 * EXPERT)
    assert passes.gram_bytes(few) == passes.gram_bytes(many) == 2 * EXPERT + NORM
    small, large = (api.plan(tmp_path / str(count), config=PLAIN) for count in (4, 24))
    assert large.peak_bytes - small.peak_bytes == 2 * 4 * (many.parameters - few.parameters)


def test_the_block_is_as_it_was_until_the_last_pass(tmp_path, quantized, monkeypatch):
    """Its own weights, norms and router, at every pass over one block."""
    states = []
    observe = collect.observe

    def spy(block, *rest):
        states.append({name: parameter.clone() for name, parameter in block.named_parameters()})
        return observe(block, *rest)

    monkeypatch.setattr(collect, "observe", spy)
    quantized(mixture(), 2 * EXPERT)
    assert len(states) % 5 == 0
    first = states[:5]
    for state in first[1:]:
        assert all(torch.equal(state[name], value) for name, value in first[0].items())
