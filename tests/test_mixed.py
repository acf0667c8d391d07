"""Mixed precision: which linears are one unit, whether targets are met, and the whole way through `quantize`."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MixtralConfig, Qwen2MoeConfig

import awq_core
from awq_core import QuantConfig
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.cli.allocation_text import allocation_text
from awq_core.errors import ConfigError, OutputError, PlanError
from awq_core.evaluation.perplexity import logits_of
from awq_core.mixed import Target, choose, keeping, language_blocks, room, verify
from awq_core.plan_types import BlockPlan, LinearPlan
from awq_core.quantization import sensitivity
from awq_core.quantization.engine import BlockDone
from awq_core.quantization.sensitivity import Sensing
from awq_core.recipe import RECIPE, read_recipe
from awq_core.report import RECORD, read_record
from awq_core.runtime.load import load
from awq_core.scale_groups import Skip
from awq_core.testing import save_tiny
from awq_core.units import titles, units_of

SETTINGS = {"config": QuantConfig(group_size=32, rounding="nearest"), "samples": 4, "seq_len": 32}


def planned(tmp_path, config, **settings):
    config.save_pretrained(tmp_path)
    return awq_core.plan(tmp_path, config=QuantConfig(**settings))


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000, dtype="bfloat16"
    )
    return planned(tmp_path_factory.mktemp("7b"), config)


def synthetic(plan, seed):
    """Sensitivities that differ by layer and kind over two orders of magnitude."""
    chance = random.Random(seed)
    return {linear.name: chance.lognormvariate(0, 1.5) for linear in plan.linears if linear.quantize}


# -- units


def test_units_of_a_dense_block(llama_config, tmp_path):
    plan = planned(tmp_path, llama_config(num_hidden_layers=2), group_size=32)
    units = units_of(plan.blocks)
    assert titles(units) == ["q+k+v", "o", "gate+up", "down"] * 2
    assert [unit.block for unit in units] == ["model.layers.0"] * 4 + ["model.layers.1"] * 4
    assert sum(unit.weights for unit in units) == sum(
        linear.in_features * linear.out_features for linear in plan.linears if linear.quantize
    )


def test_all_experts_are_one_unit(tiny_options, tmp_path):
    config = MixtralConfig(**tiny_options, num_local_experts=4)
    units = units_of(planned(tmp_path, config, group_size=32).blocks)[:3]
    assert [len(unit.linears) for unit in units] == [3, 1, 12]


def test_a_shared_expert_goes_with_what_reads_the_same_norm(tiny_options, tmp_path):
    config = Qwen2MoeConfig(
        **tiny_options,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
    )
    units = units_of(planned(tmp_path, config, group_size=32).blocks)
    experts = next(unit for unit in units if any(".experts." in linear.name for linear in unit.linears))
    shared = {linear.name for linear in experts.linears if ".experts." not in linear.name}
    assert shared == {f"model.layers.0.mlp.shared_expert.{name}_proj" for name in ("gate", "up")}
    assert len(experts.linears) == 4 * 3 + 2


def test_readers_of_a_skipped_group_are_one_unit():
    """Their norm has no weight, so that no scale is folded, but engines fuse them all the same."""
    linears = tuple(LinearPlan(f"b.0.{n}_proj", 64, 64, False, True, 32) for n in ("q", "k", "o"))
    block = BlockPlan("language", "b.0", linears, skipped=(Skip("norm", "no weight", ("q_proj", "k_proj")),))
    assert titles(units_of([block])) == ["q+k", "o"]


def test_titles_without_a_common_ending():
    linears = tuple(LinearPlan(f"b.0.{n}", 64, 64, False, True, 32) for n in ("query_key_value", "dense", "fc1"))
    assert titles(units_of([BlockPlan("language", "b.0", linears)])) == ["query_key_value", "dense", "fc1"]


# -- targets


@pytest.mark.parametrize("bits", [4.16, 4.2, 4.5, 4.6, 5.0, 6.0, 8.0, 12.0, 15.5])
@pytest.mark.parametrize("seed", range(3))
def test_bits_are_met_from_below_within_one_percent(seven_b, bits, seed):
    allocation = choose(seven_b, Target(bits=bits), synthetic(seven_b, seed), 2)
    assert 0.99 * bits <= allocation.bits <= bits
    weights = sum(choice.unit.weights for choice in allocation.choices)
    stored = sum(choice.unit.weights * (16 if choice.kept else 4 + 20 / 128) for choice in allocation.choices)
    assert allocation.bits == pytest.approx(stored / weights, rel=1e-6)


@pytest.mark.parametrize("size", ["3.9GB", "4.3GB", "5GB", "8GB", "9.5GiB"])
def test_sizes_are_met_from_below_within_one_percent(seven_b, size):
    target = Target.of(None, size)
    allocation = choose(seven_b, target, synthetic(seven_b, 1), 2)
    assert 0.99 * target.size <= allocation.size <= target.size


def test_what_costs_most_for_its_size_stays(seven_b):
    costs = dict.fromkeys((linear.name for linear in seven_b.linears if linear.quantize), 1e-6)
    dear = "model.layers.17.mlp.down_proj"
    allocation = choose(seven_b, Target(bits=4.3), {**costs, dear: 1.0}, 2)
    (unit,) = [choice for choice in allocation.choices if dear in [one.name for one in choice.unit.linears]]
    assert unit.kept


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"bits": 4.0}, ("4 bits", "less than", "from 4.156 bits to less than 16 bits")),
        ({"bits": 16.0}, ("16 bits", "as much as")),
        ({"bits": float("nan")}, ("from 4.156",)),
        ({"size": 10**9}, ("1.0 GB", "from 3.9 GB to less than 13.5 GB")),
        ({"size": 14 * 10**9}, ("14.0 GB",)),
    ],
)
def test_what_cannot_be_reached(seven_b, target, words, one_line):
    with pytest.raises(ConfigError) as error:
        room(seven_b, Target(**target), 2)
    one_line(error.value, *words)


def test_one_of_the_two(one_line):
    with pytest.raises(ConfigError) as error:
        Target.of(4.5, "5GB")
    one_line(error.value, "target_bits and target_size are both given")
    assert Target.of(None, None) is None


def test_the_names_keep_exactly_the_choice(llama_config, tmp_path):
    """Twelve layers: "layers.1" is in the names of layers 10 and 11 too."""
    plan = planned(tmp_path, llama_config(num_hidden_layers=12), group_size=32)
    for seed in range(5):
        allocation = choose(plan, Target(bits=7), synthetic(plan, seed), 4)
        again = awq_core.plan(tmp_path, config=keeping(plan, allocation))
        verify(plan, again, allocation)
        kept = {one.name for choice in allocation.choices if choice.kept for one in choice.unit.linears}
        assert kept == {one.name for one in again.linears if not one.quantize} - {"lm_head"}
        assert again.bytes_after == allocation.size


# -- the whole way


@pytest.fixture(scope="module")
def whole(tmp_path_factory, llama_source, corpus):
    """A run with a target that nothing interrupted, and its events."""
    out, events = tmp_path_factory.mktemp("mixed") / "out", []
    result = awq_core.quantize(
        llama_source, out, calibration=corpus, target_bits=12, progress=events.append, **SETTINGS
    )
    return out, result, events


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_chosen_is_what_is_written(whole, llama_source):
    out, result, events = whole
    allocation = result.allocation
    assert 0 < allocation.kept < len(allocation.choices) == 8
    stored = {path for choice in allocation.choices if not choice.kept for path in choice.unit.linears}
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert set(section["modules_to_not_convert"]) >= set(result.plan.kept_prefixes())
    with CheckpointReader(out) as reader:
        assert {f"{one.name}.qweight" for one in stored} == {n for n in reader.names if n.endswith("qweight")}
        assert sum(reader.nbytes(name) for name in reader.names) == pytest.approx(allocation.size, rel=0.01)
    shares = [event.share for event in events if isinstance(event, Sensing)]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert allocation in events
    ids = torch.arange(1, 33)
    right, mine = (logits_of(load(folder, fake_quant=True), ids).float() for folder in (llama_source, out))
    assert (mine - right).norm() < 0.2 * right.norm()


def test_the_recipe_makes_the_same_without_measuring(whole, llama_source, corpus, tmp_path, monkeypatch):
    out, _, _ = whole
    recipe = read_recipe(out / RECIPE)
    assert "target_bits" not in recipe and recipe["keep"]
    assert "# keep: chosen by sensitivity for a target of 12 bits" in (out / RECIPE).read_text()
    monkeypatch.setattr(sensitivity, "sensitivities", None)
    config = replace(SETTINGS["config"], modules_to_not_convert=tuple(recipe["keep"]))
    awq_core.quantize(llama_source, tmp_path / "again", calibration=corpus, **{**SETTINGS, "config": config})
    again = contents(tmp_path / "again")
    assert {name for name, data in contents(out).items() if again[name] != data} == {RECIPE, RECORD}
    assert read_record(out).target == "12 bits"
    assert replace(read_record(out), target="") == read_record(tmp_path / "again")


class Killed(Exception):
    pass


def interrupt(event):
    if isinstance(event, BlockDone):
        raise Killed


def test_a_resumed_run_takes_over_the_choice(whole, llama_source, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        awq_core.quantize(llama_source, out, calibration=corpus, target_bits=12, progress=interrupt, **SETTINGS)
    with pytest.raises(OutputError, match=r"target.bits was 12"):
        awq_core.quantize(llama_source, out, calibration=corpus, target_bits=11, **SETTINGS)
    monkeypatch.setattr(sensitivity, "sensitivities", None)
    result = awq_core.quantize(llama_source, out, calibration=corpus, target_bits=12, **SETTINGS)
    assert result.allocation is None
    assert contents(out) == contents(whole[0])


def test_other_samples_choose_anew(llama_source, corpus, tmp_path, monkeypatch):
    """A choice is taken over only by a run with the same settings, down to the calibration tokens."""
    calls = []
    measure = sensitivity.sensitivities
    monkeypatch.setattr(sensitivity, "sensitivities", lambda *a, **k: calls.append(1) or measure(*a, **k))
    with pytest.raises(Killed):
        awq_core.quantize(
            llama_source, tmp_path / "out", calibration=corpus, target_bits=12, progress=interrupt, **SETTINGS
        )
    with pytest.raises(OutputError, match="calibration was"):
        awq_core.quantize(llama_source, tmp_path / "out", calibration=corpus[:1] * 3, target_bits=12, **SETTINGS)
    assert len(calls) == 2


def test_round_to_nearest_calibrates_for_the_choice_alone(llama_source, corpus, tmp_path):
    config = QuantConfig(group_size=32, scale=False, clip="none")
    settings = {**SETTINGS, "config": config}
    result = awq_core.quantize(llama_source, tmp_path / "q", calibration=corpus, target_size="140KB", **settings)
    assert result.allocation.size <= 140_000 and result.reports[0].loss is None
    assert "samples" not in read_recipe(tmp_path / "q" / RECIPE)


def test_a_target_out_of_reach_is_refused_before_any_work(llama_source, tmp_path, one_line):
    with pytest.raises(ConfigError) as error:
        awq_core.quantize(llama_source, tmp_path / "q", target_bits=3, **SETTINGS)
    one_line(error.value, "3 bits", "possible")
    assert not (tmp_path / "q").exists()


def test_moe(tiny_options, tmp_path, corpus):
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=4), tmp_path / "source")
    result = awq_core.quantize(tmp_path / "source", tmp_path / "q", calibration=corpus, target_bits=18, **SETTINGS)
    kept = {one.name for choice in result.allocation.choices if choice.kept for one in choice.unit.linears}
    assert kept == {one.name for one in result.plan.linears if not one.quantize and ".gate" not in one.name} - {
        "lm_head"
    }
    assert [len(choice.unit.linears) for choice in result.allocation.choices] == [3, 1, 12] * 2


def test_a_tied_head_is_counted_once_also_after_measuring(llama_config, tmp_path, corpus):
    """The head's weight is the embedding table; filling and emptying the model must leave them one tensor."""
    save_tiny(llama_config(tie_word_embeddings=True), tmp_path / "source")
    result = awq_core.quantize(tmp_path / "source", tmp_path / "q", calibration=corpus, target_bits=12, **SETTINGS)
    assert result.plan.bytes_before == awq_core.plan(tmp_path / "source").bytes_before
    assert result.plan.bytes_after == result.allocation.size


def test_the_table(whole):
    lines = allocation_text(whole[1].allocation)
    assert lines[1].split() == ["q+k+v", "o", "gate+up", "down"]
    assert lines[2].startswith("model.layers.0") and len(lines[2].split()) == 1 + 2 * 4
    assert "units stay in 16 bits" in lines[-1]
    assert sum(line.split()[2::2].count("16") for line in lines[2:-1]) == whole[1].allocation.kept


def test_only_the_language_stack_is_chosen_among(seven_b):
    assert language_blocks(seven_b) == seven_b.blocks
    blocks = tuple(replace(block, component="vision") for block in seven_b.blocks)
    with pytest.raises(PlanError, match="this model has 0"):
        language_blocks(replace(seven_b, blocks=blocks))


# -- a unit that stays, inside a scale group


@pytest.mark.parametrize("kept", ["q_proj|k_proj|v_proj", "o_proj", "gate_proj|up_proj", "down_proj"])
def test_a_kept_unit_leaves_the_function_alone(kept, llama_config, corpus, tmp_path):
    """With outlier channels every group has scales far from one: folding one without its readers would show."""
    model = save_tiny(llama_config(), tmp_path / "source")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:3] *= 20
            layer.post_attention_layernorm.weight[:3] *= 20
            layer.self_attn.v_proj.weight[:3] *= 20
            layer.mlp.up_proj.weight[:3] *= 20
    model.save_pretrained(tmp_path / "source")
    names = tuple(f"layers.{layer}.{part}.{name}" for layer in (0, 1) for name in kept.split("|") for part in PARTS)
    ids = torch.arange(1, 65)
    right = logits_of(load(tmp_path / "source"), ids).float()
    errors = []
    for number, keep in enumerate(((), names)):
        config = QuantConfig(group_size=32, modules_to_not_convert=keep)
        settings = {**SETTINGS, "config": config}
        awq_core.quantize(tmp_path / "source", tmp_path / str(number), calibration=corpus, **settings)
        mine = logits_of(load(tmp_path / str(number), fake_quant=True), ids).float()
        errors.append(float((mine - right).norm() / right.norm()))
    scales = load_file(tmp_path / "1" / "calibration" / "scales.safetensors")
    assert max(float(scale.max() / scale.min()) for scale in scales.values()) > 3
    assert errors[1] < 1.2 * errors[0] < 0.5


PARTS = ("self_attn", "mlp")


def test_reused_scales_are_those_that_are_judged(llama_source, corpus, tmp_path):
    """Nothing is left to search, so that calibration serves the choice alone."""
    awq_core.quantize(llama_source, tmp_path / "first", calibration=corpus, **SETTINGS)
    settings = {**SETTINGS, "reuse": tmp_path / "first", "calibration": corpus}
    result = awq_core.quantize(llama_source, tmp_path / "q", target_bits=12, **settings)
    assert 0 < result.allocation.kept < 8 and result.reports[0].loss is None
    with CheckpointReader(tmp_path / "first") as first, CheckpointReader(tmp_path / "q") as mixed:
        codes = [name for name in mixed.names if name.endswith("qweight")]
        assert codes and any(torch.equal(first.tensor(name), mixed.tensor(name)) for name in codes)
