"""Sensitivities against a computation on the whole model, one token and one output at a time."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, MixtralConfig, Qwen2Config

import awq_core
from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.offload import OffloadFile
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.config import QuantConfig
from awq_core.errors import NumericsError, PlanError
from awq_core.hooks.manager import default_manager
from awq_core.model_folder import open_config
from awq_core.planning import make_plan
from awq_core.quantization.engine import Engine
from awq_core.quantization.rounding import round_trip
from awq_core.quantization.sensitivity import sensitivities
from awq_core.skeleton import build_skeleton, checkpoint_names
from awq_core.testing import save_tiny

NEAREST = QuantConfig(group_size=32, scale=False, clip="none")


@pytest.fixture
def made(tmp_path, tiny_options):
    """made(config class): (the whole model with its experts as linears, an engine on the same weights)."""
    opened = []

    def make(kind, offload=None, config=NEAREST, **options):
        model = save_tiny(kind(**{**tiny_options, **options}), tmp_path / "source")
        manager = default_manager()
        typed, owner = open_config(tmp_path / "source", manager)
        manager.prepare_model(owner, model)
        skeleton = build_skeleton(typed)
        manager.prepare_model(owner, skeleton)
        plan = make_plan(skeleton, owner, manager, config)
        reader = CheckpointReader(tmp_path / "source")
        opened.append(reader)
        names = checkpoint_names(skeleton, reader.names)
        cpu = torch.device("cpu")
        return model, Engine(reader, skeleton, names, plan, device=cpu, step_dtype=torch.float16, offload=offload)

    yield make
    for reader in opened:
        reader.close()


def data_of(*batches):
    return CalibrationData(batches, "test", len(batches), sum(batch["input_ids"].numel() for batch in batches))


def rounded(model, plan):
    """Each linear's weight, rounded to nearest."""
    return {
        one.name: round_trip(model.get_parameter(f"{one.name}.weight").data, 32, torch.float16)
        for block in plan.blocks
        for one in block.quantized
    }


def by_hand(model, quantized, batches):
    """½ Σ_t Σ_o (g_o (δx)_o)² / tokens of every linear, from a backward pass through the whole model."""
    linears = {name: model.get_submodule(name) for name in quantized}
    seen = {name: [] for name in linears}

    def watch(name):
        def keep(module, args, out):
            out.retain_grad()
            seen[name].append((args[0].detach(), out))

        return keep

    handles = [module.register_forward_hook(watch(name)) for name, module in linears.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_()))
    generator = torch.Generator().manual_seed(0)
    total = dict.fromkeys(linears, 0.0)
    tokens = 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for batch in batches:
        logits = model(**batch).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten().bool()
        loss = -logits.log_softmax(-1)[torch.arange(len(drawn)), drawn]
        loss[mask].sum().backward()
        tokens += int(mask.sum())
        for name, module in linears.items():
            error = quantized[name] - module.weight.data
            for x, out in seen[name]:
                for row, gradient in zip(x.flatten(0, -2), out.grad.flatten(0, -2), strict=True):
                    total[name] += sum(float(g * d) ** 2 for g, d in zip(gradient, error @ row, strict=True))
            seen[name].clear()
    for handle in handles:
        handle.remove()
    return {name: 0.5 * value / tokens for name, value in total.items()}


def ids(*shape, seed=0):
    return torch.randint(1, 127, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"tie_word_embeddings": True}),
        (Qwen2Config, {}),  # biases
        (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 32}),
    ],
    ids=["llama", "tied", "biases", "experts"],
)
def test_against_the_whole_model(made, kind, options):
    model, engine = made(kind, **options)
    windows = ids(2, 7)
    expected = by_hand(model, rounded(model, engine.plan), [{"input_ids": row[None]} for row in windows])
    shares = []
    found = sensitivities(
        engine, engine.plan.blocks, data_of({"input_ids": windows}), progress=lambda event: shares.append(event.share)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-12), name
    assert shares == sorted(shares) and shares[-1] == 1
    assert all(parameter.device.type == "meta" for parameter in engine.model.parameters()), "the model is empty again"


@pytest.mark.parametrize(
    ("kind", "options"),
    [(LlamaConfig, {}), (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 32})],
    ids=["shared heads", "experts"],
)
def test_the_error_is_that_of_what_is_written(made, kind, options, tmp_path):
    """One block, so that a finished run has searched it on the same inputs; its scales are undone by hand."""
    config = QuantConfig(group_size=32)
    model, engine = made(kind, config=config, num_hidden_layers=1, **options)
    windows = ids(2, 7)
    data = data_of({"input_ids": windows})
    awq_core.quantize(tmp_path / "source", tmp_path / "q", config=config, calibration=data)
    done = awq_core.load(tmp_path / "q", fake_quant=True)
    default_manager().prepare_model(open_config(tmp_path / "q", default_manager())[1], done)
    scales = load_file(tmp_path / "q" / "calibration" / "scales.safetensors")
    (block,) = engine.plan.blocks
    written = {one.name: done.get_parameter(f"{one.name}.weight").data.clone() for one in block.quantized}
    for group in block.groups:
        scale = scales[f"{block.path}.{group.prev}"]
        for name in group.layers:
            written[f"{block.path}.{name}"] /= scale
        if f"{block.path}.{group.prev}" in written:
            rows = written[f"{block.path}.{group.prev}"]
            heads = (
                scale.view(-1, group.shared.repeats, group.shared.head_dim)[:, 0].flatten() if group.shared else scale
            )
            rows *= heads[:, None]
    assert max(float(scale.max() / scale.min()) for scale in scales.values()) > 1.2
    expected = by_hand(model, written, [{"input_ids": row[None]} for row in windows])
    found = sensitivities(engine, engine.plan.blocks, data)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-12), name


def test_padding_counts_for_nothing(made):
    model, engine = made(LlamaConfig)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    batch = {"input_ids": ids(2, 9), "attention_mask": mask}
    expected = by_hand(model, rounded(model, engine.plan), [batch])
    found = sensitivities(engine, engine.plan.blocks, data_of(batch))
    assert found == pytest.approx(expected, rel=1e-3)


def test_activations_on_disk_change_nothing(made, tmp_path):
    data = data_of({"input_ids": ids(3, 8)})
    _, plain = made(LlamaConfig)
    expected = sensitivities(plain, plain.plan.blocks, data)
    file = OffloadFile(tmp_path)
    _, offloading = made(LlamaConfig, offload=file)
    assert sensitivities(offloading, offloading.plan.blocks, data) == expected
    file.close()


def test_tokens_beyond_the_limit_are_not_read(made):
    _, engine = made(LlamaConfig)
    few = sensitivities(engine, engine.plan.blocks, data_of({"input_ids": ids(2, 8)}))
    more = {"input_ids": torch.cat([ids(2, 8), ids(5, 8, seed=1)])}
    assert sensitivities(engine, engine.plan.blocks, data_of(more), tokens=9) == few


def test_an_expert_that_no_token_reaches_costs_nothing(made):
    _, engine = made(MixtralConfig, num_local_experts=8, intermediate_size=32)
    found = sensitivities(engine, engine.plan.blocks, data_of({"input_ids": ids(1, 1)}))
    assert sum(value == 0.0 for name, value in found.items() if ".experts." in name) == 2 * 6 * 3  # 2 of 8 a layer
    assert all(value > 0 for name, value in found.items() if "self_attn.v_proj" in name)


def test_a_block_without_a_gradient_is_refused_in_one_line(made, one_line, monkeypatch):
    _, engine = made(LlamaConfig)
    block = engine.model.model.layers[1]
    forward = block.forward
    monkeypatch.setattr(type(block), "forward", lambda self, *a, **k: _detached(forward, self, a, k))
    with pytest.raises(PlanError) as error:
        sensitivities(engine, engine.plan.blocks, data_of({"input_ids": ids(1, 4)}))
    one_line(error.value, "has no gradient")


def _detached(forward, block, args, kwargs):
    return args[0].detach()


def test_what_is_not_finite_is_named(made, one_line, monkeypatch):
    _, engine = made(LlamaConfig)
    real = nn.functional.linear
    monkeypatch.setattr("awq_core.quantization.sensitivity.linear", lambda x, error: real(x, error) * float("inf"))
    with pytest.raises(NumericsError) as error:
        sensitivities(engine, engine.plan.blocks, data_of({"input_ids": ids(1, 4)}))
    one_line(error.value, "model.layers.", "not finite")
