"""Correction for drifted inputs and of biases, against least squares and token-by-token means."""

import copy

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

from awq_core import api
from awq_core.calibration.batches import CalibrationData
from awq_core.config import QuantConfig
from awq_core.errors import ConfigError
from awq_core.quantization import correction
from awq_core.quantization.rounding import round_trip
from awq_core.runtime.load import load
from awq_core.testing import TINY_DECODER
from awq_core.testing.tiny import save_tiny

TINY = {**TINY_DECODER, "num_hidden_layers": 3}
NEAREST = {"group_size": 32, "scale": False, "clip": "none"}


@pytest.fixture
def batches(generator):
    """Two batches, the second with padding on the left."""
    ids = torch.randint(1, 127, (2, 6, 40), generator=generator)
    mask = torch.ones(6, 40, dtype=torch.long)
    mask[:3, :7] = 0
    return [
        {"input_ids": ids[0], "attention_mask": torch.ones_like(mask)},
        {"input_ids": ids[1], "attention_mask": mask},
    ]


def quantize(tmp_path, config, batches, dtype=torch.float32, name="out", run=api.quantize, **settings):
    model = save_tiny(config, tmp_path / "source", dtype=dtype)
    data = CalibrationData(tuple(batches), "test", 12, 480)
    result = run(tmp_path / "source", tmp_path / name, config=QuantConfig(**settings), calibration=data)
    return model, result


def inputs_of(model, path, batches):
    """What module `path` reads of the tokens that are no padding: `[tokens, in]`, fp64."""
    rows = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()].double() for x, batch in zip(rows, batches, strict=True)])


def test_the_whole_step_is_least_squares(generator):
    """Strength 1: W* is the linear map that comes nearest to W x, given x̂."""
    read = torch.randn(500, 24, generator=generator)
    original = read + 0.3 * torch.randn(500, 24, generator=generator) + 0.2 * read.roll(1, dims=1)
    weight = torch.randn(8, 24, generator=generator)
    drifted = (original - read).T @ read / 500

    class Seen:
        gram = read.T @ read / 500

    (step,) = correction.steps({"a": drifted}, {"a": Seen, "b": Seen}, 1.0).values()
    expected = torch.linalg.lstsq(read.double(), (original @ weight.T).double()).solution.T
    torch.testing.assert_close((weight + weight @ step.T).double(), expected, rtol=0, atol=0.05)
    assert (weight - expected).abs().max() > 0.5


def test_without_tokens_nothing_is_corrected():
    class Unseen:
        gram = torch.zeros(4, 4)

    assert correction.steps({"a": torch.ones(4, 4)}, {"a": Unseen}, 1.0) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_are_those_of_both_models_inputs(tmp_path, batches, dtype):
    """Every linear is the rounded target, made from what the original and the half-quantized model really feed it."""
    model, _ = quantize(tmp_path, LlamaConfig(**TINY), batches, dtype, **NEAREST, correct_inputs=0.5)
    written = load(tmp_path / "out", fake_quant=True)
    steps = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
    hybrid = copy.deepcopy(model)
    moved = 0.0
    for layer in range(3):
        block = f"model.layers.{layer}"
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            x, read = (inputs_of(which, f"{block}.{name}", batches) for which in (model, hybrid))
            weight = model.get_submodule(f"{block}.{name}").weight.detach().double()
            gram, drifted = read.T @ read / len(read), (x - read).T @ read / len(read)
            damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
            target = weight + 0.5 * weight @ drifted @ damped.inverse()
            moved = max(moved, float((target - weight).abs().max()))
            nearest = round_trip(target.float(), 32, steps)
            got = written.get_submodule(f"{block}.{name}").weight.float()
            off = ((got - nearest).abs() > 1e-3).float().mean()  # a code may fall on the other side of a tie
            assert off < (0.002 if dtype is torch.float32 else 0.12), (name, float(off))
            if layer:
                uncorrected = round_trip(weight.float(), 32, steps)
                assert ((got - uncorrected).abs() > 1e-3).float().mean() > 0.2
            assert layer or torch.equal(target, weight), "nothing has drifted before the first block"
        hybrid.model.layers[layer] = written.model.layers[layer]
    assert moved > 0.01


def test_drift_is_made_up_for(tmp_path, batches):
    """Closer to what the original model computes, block for block, on the calibration tokens."""
    errors = {}
    for strength in (0.0, 0.5):
        model, _ = quantize(
            tmp_path, LlamaConfig(**TINY), batches, name=str(strength), **NEAREST, correct_inputs=strength
        )
        written = load(tmp_path / str(strength), fake_quant=True)
        wanted, got = (inputs_of(which, "model.norm", batches) for which in (model, written))
        errors[strength] = float((wanted - got).square().mean())
    assert errors[0.5] < errors[0.0]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_a_mixture_is_corrected_outside_its_experts(tmp_path, batches, rounding):
    config = MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2)
    weights = {}
    for strength in (0.0, 0.5):
        settings = NEAREST | {"rounding": rounding, "correct_inputs": strength}
        _, result = quantize(tmp_path, config, batches, name=str(strength), **settings)
        weights[strength] = load(tmp_path / str(strength), fake_quant=True).state_dict()
    assert all(report.loss <= report.loss_rtn * 1.001 for report in result.reports)
    changed = {name for name, value in weights[0.0].items() if not torch.equal(value, weights[0.5][name])}
    assert "model.layers.1.self_attn.q_proj.weight" in changed
    assert not any("layers.0" in name for name in changed)


def test_the_same_bytes_offloaded_and_resumed(tmp_path, batches):
    def files(name):
        folder = tmp_path / name
        return {p.name: p.read_bytes() for p in folder.rglob("*.safetensors")}

    class Stop(Exception):
        pass

    def interrupted(*args, **options):
        def stop(event):
            raise Stop

        with pytest.raises(Stop):
            api.quantize(*args, **options, progress=stop)
        return api.quantize(*args, **options)

    settings = {"group_size": 32, "rounding": "greedy", "correct_inputs": 0.5, "correct_bias": True}
    config = Qwen2Config(**TINY)
    quantize(tmp_path, config, batches, name="plain", **settings)
    quantize(tmp_path, config, batches, name="resumed", run=interrupted, **settings)
    quantize(
        tmp_path, config, batches, name="disk", run=lambda *a, **o: api.quantize(*a, **o, offload=tmp_path), **settings
    )
    assert files("plain") == files("resumed") == files("disk")


@pytest.mark.parametrize(
    "settings", [{}, {"scale": False, "clip": "none"}, {"rounding": "gptq"}, {"rounding": "heuristic"}]
)
def test_a_bias_absorbs_the_mean_error(tmp_path, batches, settings):
    """The first block's q, k and v compute what they computed, on average over the calibration tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(**TINY)
    source = save_tiny(config, tmp_path / "source", dtype=torch.float32)
    data = CalibrationData(tuple(batches), "test", 12, 480)
    outputs = {}
    for correct in (False, True):
        folder = tmp_path / str(correct)
        chosen = QuantConfig(group_size=32, correct_bias=correct, **settings)
        result = api.quantize(tmp_path / "source", folder, config=chosen, calibration=data)
        outputs[correct] = load(folder, fake_quant=True)
    # With scales v's rows are divided by those of o.
    for name in ("q_proj", "k_proj") if settings.get("scale", True) else ("q_proj", "k_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"

        def mean(model, path=path):
            linear = model.get_submodule(path)
            return (inputs_of(model, path, batches) @ linear.weight.T.double() + linear.bias.double()).mean(0)

        wanted = mean(source)
        assert (mean(outputs[True]) - wanted).abs().max() < 1e-5 < (mean(outputs[False]) - wanted).abs().max()
    losses = {report.name: (report.loss, report.loss_rtn) for report in result.reports}
    assert all(loss <= rtn * 1.2 for loss, rtn in losses.values())


def test_fractions_only():
    with pytest.raises(ConfigError, match="correct_inputs"):
        QuantConfig(correct_inputs=1.5)
