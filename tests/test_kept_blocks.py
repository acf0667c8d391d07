"""A block that is kept amid quantized ones still feeds the next: its statistics are those of the finished model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import awq_core
from awq_core import QuantConfig
from awq_core.hooks import Architecture, LayerStack, hookimpl, presets
from awq_core.hooks.manager import PluginManager
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load
from awq_core.testing import save_tiny

GROUP = 32
LANGUAGE = LayerStack(component="language", blocks="model.layers")
WINDOWS = torch.randint(8, 100, (4, 24), generator=torch.Generator().manual_seed(0))


def plugin(**fields):
    """A manager with one plugin, which owns the tiny model."""
    arch = Architecture(family="acorn", model_types=("llama",), **{"stacks": (LANGUAGE,), **fields})

    class Plugin:
        @hookimpl
        def awq_architectures(self):
            return (arch,)

    manager = PluginManager(allow=())
    manager.register(Plugin(), "acorn")
    return manager


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Round-to-nearest on 16 levels of each group's range, which includes zero; steps as fp16 holds them."""
    groups = weight.double().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 15).half().double()
    zero = (-low / step).round()
    return (((groups / step).round() + zero).clamp(0, 15) - zero).mul(step).flatten(-2)


@pytest.mark.parametrize("kept", [("layers.1.",), ("layers.0.", "layers.2."), ("layers.3.",), ()])
def test_every_block_is_calibrated_on_what_it_will_read(tmp_path, llama_config, kept):
    source, out = tmp_path / "source", tmp_path / "out"
    original = save_tiny(llama_config(num_hidden_layers=4), source)
    seen = []
    result = awq_core.quantize(
        source,
        out,
        config=QuantConfig(
            correct_inputs=0, group_size=GROUP, scale=False, clip="asymmetric", modules_to_not_convert=kept
        ),
        calibration=WINDOWS.tolist(),
        samples=len(WINDOWS),
        seq_len=WINDOWS.shape[1],
        progress=lambda event: seen.append(event) if hasattr(event, "path") else None,
    )
    worked = [i for i in range(4) if f"layers.{i}." not in kept]
    assert [event.path for event in seen] == [f"model.layers.{i}" for i in worked]
    assert [(event.done, event.total) for event in seen] == [(i + 1, len(worked)) for i in range(len(worked))]

    inputs = {}
    model = load(out, fake_quant=True)
    for i in worked:
        attention = model.model.layers[i].self_attn.q_proj
        attention.register_forward_pre_hook(lambda module, args, i=i: inputs.__setitem__(i, args[0].double()))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    reports = {report.name: report for report in result.reports}
    assert len(reports) == 7 * len(worked)
    for i in worked:
        name = f"model.layers.{i}.self_attn.k_proj"
        weight = original.get_submodule(name).weight.detach().double()
        error = inputs[i].flatten(0, 1) @ (nearest(weight) - weight).T
        assert reports[name].loss_rtn == pytest.approx(float(error.square().mean()), rel=1e-3)


def test_a_stack_that_is_one_linear_is_calibrated_like_any_block(tmp_path, llama_config, corpus):
    """An output head, or a projector, may be declared as a stack; the block is the linear then."""
    head = LayerStack(component="head", blocks="lm_head")
    manager = plugin(stacks=(head, LANGUAGE))
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(llama_config(), source)
    config = QuantConfig(group_size=GROUP, components={"head": "4bit", "language": "keep"})
    result = awq_core.quantize(source, out, config=config, calibration=corpus, samples=4, seq_len=32, manager=manager)
    (report,) = result.reports
    assert report.name == "lm_head" and report.tokens == 4 * 32 and report.loss <= report.loss_rtn
    names = load_file(out / "model.safetensors").keys()
    heads = {name.removeprefix("lm_head.") for name in names if name.startswith("lm_head.")}
    assert heads == {"qweight", "qzeros", "scales"}
    assert not any("layers" in name and name.endswith("qweight") for name in names)
    model = load(out, manager=manager)
    assert [name for name, module in model.named_modules() if isinstance(module, QuantLinear)] == ["lm_head"]
    with torch.no_grad():
        got, want = (m(input_ids=WINDOWS).logits for m in (model, load(out, manager=manager, fake_quant=True)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_input_may_be_observed_where_it_enters_a_module(tmp_path, llama_source, corpus):
    """Attention is called with its input by name, the MLP by position; both read what their linears read."""
    attention, mlp = presets.attention(), presets.gated_mlp()
    observed = (
        replace(attention[0], observe="self_attn"),
        attention[1],
        replace(mlp[0], observe="mlp"),
        mlp[1],
    )
    made = []
    for name, groups in (("plain", presets.LLAMA_BLOCK), ("observed", observed)):
        manager = plugin(scale_groups=groups)
        config = QuantConfig(group_size=GROUP)
        options = {"config": config, "calibration": corpus, "samples": 4, "seq_len": 32, "manager": manager}
        made.append((awq_core.quantize(llama_source, tmp_path / name, **options), tmp_path / name))
    (plain, first), (other, second) = made
    assert [group.observe for group in other.plan.blocks[0].groups][::2] == ["self_attn", "mlp"]
    assert plain.reports == other.reports and any(report.alpha for report in plain.reports)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
