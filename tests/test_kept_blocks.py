"""A block that is kept amid quantized ones still feeds the next: its statistics are those of the finished model."""

import pytest
import torch

import awq_core
from awq_core import QuantConfig
from awq_core.runtime.load import load
from awq_core.testing import save_tiny

GROUP = 32
WINDOWS = torch.randint(8, 100, (4, 24), generator=torch.Generator().manual_seed(0))


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
        config=QuantConfig(group_size=GROUP, scale=False, clip="asymmetric", modules_to_not_convert=kept),
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
