"""Experts: statistics weighted by the gate, against sums made token by token from the model's own stacked experts."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

from awq_core import api
from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.statistics import Statistics
from awq_core.calibration.trace import record
from awq_core.config import QuantConfig
from awq_core.modules import UnstackedExperts, unstack_experts
from awq_core.quantization import gptq
from awq_core.quantization.block import quantize_block
from awq_core.quantization.collect import collect
from awq_core.quantization.rounding import round_trip
from awq_core.testing.tiny import save_tiny

from .conftest import statistics_of

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
EXPERTS, INNER = 6, 96
PLAIN = QuantConfig(group_size=32)


def mixtral(k):
    return MixtralConfig(**TINY, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=k)


def qwen(k):
    """Its gates do not add up to one, so they differ with a single expert a token too; and it has a shared expert."""
    shape = {"intermediate_size": INNER, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": 128}
    return Qwen2MoeConfig(**TINY, **shape, num_experts=EXPERTS, num_experts_per_tok=k, norm_topk_prob=False)


NAMES = {"mixtral": ("w1", "w3", "w2"), "qwen2_moe": ("gate_proj", "up_proj", "down_proj")}


def padded_batches(generator, rows=4, length=40):
    ids = torch.randint(1, 127, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :25], mask[1, :7] = 0, 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1, :11]}]


class Setting:
    """A model as it comes, the same with unstacked experts, and what the experts were given, token by token."""

    def __init__(self, folder, config, batches, dtype=torch.float32):
        save_tiny(config, folder)
        self.names = NAMES[config.model_type]
        self.plan = api.plan(folder, config=PLAIN).blocks[0]
        stacked = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        model = copy.deepcopy(stacked)
        assert unstack_experts(model, "mlp.experts", self.names)
        self.block = model.model.layers[0]
        self.inputs = record(model, [self.block], batches)
        experts = stacked.model.layers[0].mlp.experts
        self.x, self.gates, self.inner = [], [], []
        with torch.no_grad():
            for batch in batches:
                calls = []
                handle = experts.register_forward_pre_hook(lambda module, given, calls=calls: calls.append(given))
                stacked(**batch)
                handle.remove()
                ((x, index, weights),) = calls
                kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).reshape(-1)
                for token in kept.nonzero()[:, 0].tolist():
                    gate = [0.0] * EXPERTS
                    for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                        gate[expert] += weight
                    inner = []
                    for expert in range(EXPERTS):
                        first, second = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                        inner.append((experts.act_fn(first) * second).double())
                    self.x.append(x[token].double())
                    self.gates.append(gate)
                    self.inner.append(inner)

    def oracle(self, rows, expert):
        """(H, E|x|, E[x], effective tokens, routed tokens) by the formulas, one token after another."""
        n0, n = float(len(rows[0])), len(rows)
        squares = [gate[expert] ** 2 for gate in self.gates]
        total, fourth = sum(squares), sum(square**2 for square in squares)
        n_eff = total**2 / fourth if fourth else 0.0
        gram, mean_abs, mean = torch.zeros(len(rows[0]), len(rows[0])).double(), 0, 0
        sum_of_squares = 0.0
        for x, square in zip(rows, squares, strict=True):
            weight = (n_eff * (square / total if total else 0.0) + n0 / n) / (n_eff + n0)
            gram += weight * torch.outer(x, x)
            mean_abs, mean = mean_abs + weight * x.abs(), mean + weight * x
            sum_of_squares += weight**2
        return gram, mean_abs, mean, 1 / sum_of_squares, sum(square > 0 for square in squares)

    def observed(self):
        found = {}
        for part in collect(self.block, self.plan, self.inputs, 0):
            assert not found.keys() & part.keys()
            found.update(part)
        return found

    def path(self, expert, which):
        return f"mlp.experts.{expert}.{self.names[which]}"


def assert_statistics(found, expected, n, tolerance):
    gram, mean_abs, mean, effective, routed = expected
    for value, wanted in ((found.gram, gram), (found.mean_abs, mean_abs), (found.mean, mean)):
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    assert found.n_effective == pytest.approx(effective, rel=max(tolerance, 1e-5))
    assert (found.n, found.routed) == (n, routed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "k"), [(mixtral, 2), (qwen, 1), (qwen, 3)])
def test_every_experts_statistics_are_the_weighted_sums_over_its_tokens(tmp_path, generator, config, k, dtype):
    setting = Setting(tmp_path, config(k), padded_batches(generator), dtype)
    found = setting.observed()
    tokens = len(setting.x)
    assert tokens == 4 * 40 - 25 - 7 + 11
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    routed = 0
    for expert in range(EXPERTS):
        of_input = setting.oracle(setting.x, expert)
        of_inner = setting.oracle([inner[expert] for inner in setting.inner], expert)
        gate, up, down = (found[setting.path(expert, which)] for which in range(3))
        assert gate.own is up.own and gate.gram is up.gram is found[setting.path(0, 0)].gram
        assert_statistics(gate.with_own(), of_input, tokens, tolerance)
        assert_statistics(down, of_inner, tokens, tolerance)
        routed += of_input[-1]
    assert routed == k * tokens
    everything = torch.stack(setting.x)
    torch.testing.assert_close(found[setting.path(0, 0)].gram, (everything.T @ everything / tokens).float())


def test_an_expert_without_a_token_has_the_statistics_of_all_tokens(tmp_path, generator, monkeypatch):
    batches = [{"input_ids": torch.randint(1, 127, (1, 3), generator=generator)}]
    setting = Setting(tmp_path, qwen(1), batches)
    gated = setting.observed()
    monkeypatch.delattr(UnstackedExperts, "gate_weights")
    plain = setting.observed()
    idle = [expert for expert in range(EXPERTS) if not any(gate[expert] for gate in setting.gates)]
    assert len(idle) >= 3
    for expert in range(EXPERTS):
        for which in range(3):
            name = setting.path(expert, which)
            one, other = gated[name].with_own(), plain[name]
            assert torch.equal(one.gram, other.gram) == (expert in idle)
            assert plain[name].routed is None and other.n == one.n == 3
            if expert in idle:
                assert torch.equal(one.mean, other.mean) and torch.equal(one.mean_abs, other.mean_abs)
                assert one.n_effective == 3 and one.routed == 0


@pytest.mark.parametrize("scale", [True, False])
def test_reported_losses_are_those_over_the_experts_weighted_tokens(tmp_path, generator, scale):
    """In the units of the original output, before and after, though the input was scaled in between."""
    setting = Setting(tmp_path, mixtral(2), padded_batches(generator))
    original = {name: value.clone() for name, value in setting.block.named_parameters()}
    parts = collect(setting.block, setting.plan, setting.inputs, 0)
    config = QuantConfig(group_size=32, scale=scale)
    result = quantize_block(setting.block, setting.plan, parts, config, torch.float16)
    reports = {report.name.removeprefix(setting.plan.path + "."): report for report in result.reports}
    shared = result.scales.get(f"{setting.plan.path}.post_attention_layernorm", torch.ones(64))
    for expert in range(EXPERTS):
        gate, up, down = (setting.path(expert, which) for which in range(3))
        own = result.scales.get(f"{setting.plan.path}.{up}", torch.ones(INNER))
        inner = [one[expert] for one in setting.inner]
        for name, rows, columns, outputs in (
            (gate, setting.x, shared, torch.ones(INNER)),
            (up, setting.x, shared, own),
            (down, inner, own, torch.ones(64)),
        ):
            gram = setting.oracle(rows, expert)[0]
            weight = original[f"{name}.weight"].double()
            written = setting.block.get_parameter(f"{name}.weight").double() * outputs[:, None] / columns
            rounded = round_trip(weight.float(), 32, torch.float16).double()
            for value, error in ((reports[name].loss, written - weight), (reports[name].loss_rtn, rounded - weight)):
                assert value == pytest.approx(float((error @ gram * error).sum() / len(weight)), rel=2e-3)


def test_reports_count_routed_tokens(tmp_path, generator):
    save_tiny(mixtral(2), tmp_path / "source")
    batches = tuple(padded_batches(generator))
    data = CalibrationData(batches, "test", 5, 139)
    result = api.quantize(tmp_path / "source", tmp_path / "out", config=PLAIN, calibration=data)
    routed = {report.name: report.routed for report in result.reports}
    for name in NAMES["mixtral"]:
        counts = [routed[f"model.layers.0.mlp.experts.{expert}.{name}"] for expert in range(EXPERTS)]
        assert sum(counts) == 2 * 139
    assert routed["model.layers.0.self_attn.q_proj"] is None
    assert all(report.tokens == 139 for report in result.reports)


def test_gptq_asks_for_effective_tokens(generator):
    x = torch.randn(1000, 64, generator=generator)
    full = statistics_of(x)
    few = Statistics(full.n, full.gram, full.mean_abs, full.mean, effective=200.4)
    assert isinstance(gptq.prepare(full), gptq.Prepared)
    refused = gptq.prepare(few)
    assert isinstance(refused, gptq.TooFewTokens)
