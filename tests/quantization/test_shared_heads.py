"""Grouped-query attention: tied scales keep the function, and only scales tied as the heads are do.

The oracles know nothing of `SharedHeads`: transformers' own `repeat_kv`, and whole models run before and after.
"""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen2Config
from transformers.models.llama.modeling_llama import repeat_kv

from awq_core import api
from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.statistics import Statistics
from awq_core.config import QuantConfig
from awq_core.errors import PlanError
from awq_core.hooks import Architecture, LayerStack, hookimpl, presets
from awq_core.hooks.manager import PluginManager
from awq_core.quantization import proof, scales
from awq_core.quantization.fold import apply_to_block
from awq_core.quantization.linear import Pending
from awq_core.runtime.load import load
from awq_core.scale_groups import resolve_groups
from awq_core.shared_heads import SharedHeads
from awq_core.testing.tiny import save_tiny

from .conftest import outlier_layer, statistics_of

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SHAPES = [(4, 2, 16), (8, 2, 24), (8, 4, 8)]  # query heads, value heads, head_dim
CONFIGS = {
    "plain": lambda heads, kv, size: LlamaConfig(
        **TINY, num_attention_heads=heads, num_key_value_heads=kv, head_dim=size
    ),
    "biases": lambda heads, kv, size: LlamaConfig(
        **TINY, num_attention_heads=heads, num_key_value_heads=kv, head_dim=size, attention_bias=True
    ),
    "value-bias-only": lambda heads, kv, size: Qwen2Config(
        **TINY, num_attention_heads=heads, num_key_value_heads=kv, head_dim=size
    ),
}


def manager(groups=presets.LLAMA_BLOCK):
    arch = Architecture(
        family="oak",
        model_types=("llama", "qwen2"),
        stacks=(LayerStack(component="language", blocks="model.layers"),),
        scale_groups=groups,
    )

    class Oak:
        @hookimpl
        def awq_architectures(self):
            return [arch]

    result = PluginManager(allow=())
    result.register(Oak(), "oak", dist="awq-plugin-oak", version="1")
    return result


def tiny(config):
    plugins = manager()
    return proof.tiny_model(config, plugins.owner(config), plugins)


def logits(model):
    ids = torch.randint(1, 60, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def moved(model, before):
    return float((logits(model) - before).norm() / before.norm())


def value_group(block):
    (group,) = (g for g in resolve_groups(block, presets.LLAMA_BLOCK)[0] if g.prev == "self_attn.v_proj")
    return group


# -- which channel is which -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv", "size"), SHAPES)
def test_channels_are_spread_as_transformers_repeats_heads(generator, heads, kv, size):
    shared = SharedHeads(heads // kv, size)
    t = torch.randn(kv * size, generator=generator)
    wide = repeat_kv(t.view(1, kv, 1, size), heads // kv).flatten()
    assert torch.equal(shared.spread(t), wide)
    assert torch.equal(shared.first(wide), t)
    torch.testing.assert_close(shared.pool(wide), t)


def test_pooled_magnitudes_are_those_of_all_inputs_a_scale_is_used_on(generator):
    x = torch.randn(50, 6 * 8, generator=generator)
    by_head = x.view(50, 3, 2, 8)
    expected = torch.stack([by_head[:, h, :, j].abs().mean() for h in range(3) for j in range(8)])
    torch.testing.assert_close(SharedHeads(2, 8).pool(x.abs().mean(0)), expected)


# -- the function stays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv", "size"), SHAPES)
@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_any_scales_of_the_values_leave_the_function(generator, make, heads, kv, size):
    model = tiny(make(heads, kv, size))
    before = logits(model)
    for block in model.model.layers:
        group = value_group(block)
        assert block.self_attn.v_proj.out_features == kv * size
        apply_to_block(block, group, torch.exp(torch.randn(heads * size, generator=generator)))
        assert (block.self_attn.v_proj.bias is None) == (make is CONFIGS["plain"])
    assert moved(model, before) < 1e-5


@pytest.mark.parametrize("wrong", ["untied", "as repeat, not repeat_interleave", "half a head"])
def test_scales_tied_otherwise_change_it(generator, wrong):
    heads, kv, size = 4, 2, 16
    model = tiny(CONFIGS["plain"](heads, kv, size))
    before = logits(model)
    for block in model.model.layers:
        t = torch.exp(torch.randn(kv * size, generator=generator))
        s = {
            "untied": torch.exp(torch.randn(heads * size, generator=generator)),
            "as repeat, not repeat_interleave": t.repeat(2),
            "half a head": SharedHeads(2, size // 2).spread(t),
        }[wrong]
        block.self_attn.v_proj.weight.data.div_(t[:, None])
        block.self_attn.o_proj.weight.data.mul_(s)
    assert moved(model, before) > 0.1


@pytest.mark.parametrize(("heads", "kv", "size"), SHAPES)
@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_the_proof_holds_for_every_shape(make, heads, kv, size):
    config, plugins = make(heads, kv, size), manager()
    owner = plugins.owner(config)
    result = proof.prove(config, owner, plugins)
    assert result.proved and result.groups == 8
    assert proof.prove(config, owner, plugins, fold_previous=False, only=1).error > 0.05  # v -> o, readers only


def test_the_proof_refuses_a_wrong_head_size(one_line):
    """`num_key_value_groups` is 2, and 2 divides everything: only the outputs tell."""
    norm, values, *mlp = presets.LLAMA_BLOCK
    values = dataclasses.replace(values, head_dim="self_attn.num_key_value_groups")
    config, plugins = CONFIGS["plain"](4, 2, 16), manager((norm, values, *mlp))
    with pytest.raises(PlanError) as caught:
        proof.require_proof(config, plugins.owner(config), plugins)
    one_line(caught.value, "model.layers.0: self_attn.v_proj -> self_attn.o_proj changes the model's function")


# -- the search -------------------------------------------------------------------------------------------------------


def tied(scale, shared):
    heads = scale.view(-1, shared.repeats, shared.head_dim)
    return all(torch.equal(heads[:, 0], heads[:, i]) for i in range(shared.repeats))


@pytest.mark.parametrize("shared", [SharedHeads(2, 16), SharedHeads(4, 32), SharedHeads(4, 8)])
def test_what_is_found_is_tied_exactly_and_no_worse_than_none(generator, shared):
    x, weight = outlier_layer(generator)
    found = scales.search([Pending(weight)], statistics_of(x), 64, torch.float16, shared)
    free = scales.search([Pending(weight)], statistics_of(x), 64, torch.float16)
    assert found.family != "identity" and not torch.equal(found.scale, torch.ones(128))
    assert tied(found.scale, shared) and not tied(free.scale, shared)
    assert found.loss <= found.loss_identity == free.loss_identity


def test_every_candidate_is_tied(generator, monkeypatch):
    x, weight = outlier_layer(generator)
    scored, shared, loss = [], SharedHeads(2, 16), scales.round_trip_loss
    monkeypatch.setattr(
        scales, "round_trip_loss", lambda w, scale, *rest: scored.append(scale) or loss(w, scale, *rest)
    )
    scales.search([Pending(weight)], statistics_of(x), 64, torch.float16, shared)
    assert len(scored) > 2 * scales.GRID and all(tied(scale, shared) for scale in scored)


def test_a_channel_that_one_query_head_never_uses_has_the_others_scale(generator):
    x, weight = outlier_layer(generator, outliers=0)
    shared = SharedHeads(2, 16)
    x[:, 5] *= 40
    x[:, 16 + 5] = 0  # the same value channel in the next query head
    x[:, [7, 16 + 7]] = 0  # dead in both
    found = scales.search([Pending(weight)], statistics_of(x), 64, torch.float16, shared)
    assert found.scale[5] == found.scale[21] > 1.5
    assert found.scale[7] == found.scale[23] == 1 and tied(found.scale, shared)


def test_inputs_that_are_all_zero_give_the_identity(generator):
    statistics = Statistics(10, torch.zeros(64, 64), torch.zeros(64), torch.zeros(64))
    weight = torch.randn(8, 64, generator=generator)
    found = scales.search([Pending(weight)], statistics, 32, torch.float16, SharedHeads(2, 16))
    assert torch.equal(found.scale, torch.ones(64)) and found.family == "identity"


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(generator):
    return CalibrationData(({"input_ids": torch.randint(1, 127, (6, 40), generator=generator)},), "test", 1, 240)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_output_are_written_with_the_same_scales(tmp_path, data, dtype):
    """Block 0 as it is on disk, token by token: t times its values are the original's, and its output projection takes
    s from its columns. Both miss by what the reports say, which is no more than round-to-nearest's."""
    heads, kv, size = 8, 2, 16
    model = save_tiny(CONFIGS["biases"](heads, kv, size), tmp_path / "source", dtype=dtype)
    result = api.quantize(tmp_path / "source", tmp_path / "out", config=QuantConfig(group_size=32), calibration=data)
    done = load(tmp_path / "out", fake_quant=True).float()
    model = model.float()
    path = "model.layers.0.self_attn"
    s = read_scales(tmp_path / "out")[f"{path}.v_proj"]
    assert tied(s, SharedHeads(heads // kv, size)) and s.max() > 1
    t = s.view(kv, heads // kv, size)[:, 0].flatten()
    seen = {}
    for which, one in (("was", model), ("is", done)):
        for name in ("v_proj", "o_proj"):
            at = one.get_submodule(f"{path}.{name}")
            at.register_forward_hook(lambda m, args, out, key=(which, name): seen.update({key: args[0].flatten(0, 1)}))
        with torch.no_grad():
            one(**data.batches[0])
    old, new = model.get_submodule(path), done.get_submodule(path)
    torch.testing.assert_close(
        new.v_proj.bias * t, old.v_proj.bias, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=0
    )
    with torch.no_grad():
        values = seen["is", "v_proj"] @ new.v_proj.weight.T * t - seen["was", "v_proj"] @ old.v_proj.weight.T
        output = seen["was", "o_proj"] / s @ new.o_proj.weight.T - seen["was", "o_proj"] @ old.o_proj.weight.T
    reports = {report.name: report for report in result.reports}
    for name, error in (("v_proj", values), ("o_proj", output)):
        report = reports[f"{path}.{name}"]
        exact = 1e-3 if dtype is torch.float32 else 0.1
        assert report.loss == pytest.approx(float(error.square().mean()), rel=exact), name
        assert report.loss <= report.loss_rtn


def test_tied_scales_are_reused(tmp_path, data):
    save_tiny(CONFIGS["value-bias-only"](8, 2, 16), tmp_path / "source", dtype=torch.bfloat16)
    settings = QuantConfig(group_size=32, rounding="nearest")
    api.quantize(tmp_path / "source", tmp_path / "out", config=settings, calibration=data)
    api.quantize(tmp_path / "source", tmp_path / "again", config=settings, reuse=tmp_path / "out")
    first, again = (next((tmp_path / name).glob("*.safetensors")).read_bytes() for name in ("out", "again"))
    assert first == again


def read_scales(folder):
    return load_file(folder / "calibration" / "scales.safetensors")


def test_where_heads_are_not_shared_the_same_bytes_are_written(tmp_path, data):
    """`head_dim` declared or not: multi-head attention is quantized as if the field did not exist."""
    config = CONFIGS["biases"](4, 4, 16)
    save_tiny(config, tmp_path / "source")
    written = []
    for name, path in (("with", "self_attn.head_dim"), ("without", "")):
        groups = [dataclasses.replace(g, head_dim=path) if g.head_dim else g for g in presets.LLAMA_BLOCK]
        options = {"config": QuantConfig(group_size=32), "calibration": data, "manager": manager(tuple(groups))}
        api.quantize(tmp_path / "source", tmp_path / name, **options)
        written.append(next((tmp_path / name).glob("*.safetensors")).read_bytes())
    assert written[0] == written[1]
