"""A fused model whose norms, rotary and attention are Triton's, against fp32. `test_triton.py` runs this file."""

import pytest
import torch
from transformers import Qwen3Config, StaticCache

import awq_core
from awq_core import QuantConfig
from awq_core.kernels.triton.matmul import INTERPRETED
from awq_core.modules import fusing
from awq_core.runtime import fused
from awq_core.runtime.load import load
from awq_core.testing import save_tiny

DEVICE = "cpu" if INTERPRETED else "cuda"
IDS = torch.randint(8, 100, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0


@torch.no_grad()
def logits(model):
    """Of a prompt and the tokens after it, one by one, over a cache larger than they need; without those of padding."""
    cache, mask = StaticCache(config=model.config, max_cache_len=9), MASK.to(model.device)
    ids = IDS.to(model.device)
    steps = [model(input_ids=ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache).logits]
    for end in range(4, 7):
        step = model(input_ids=ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=cache)
        steps.append(step.logits)
    return torch.cat(steps, dim=1)[:, 2:].double().cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fused_model(tmp_path, tiny_options, monkeypatch, capsys, dtype):
    """Grouped queries, head norms, padding. A short dtype moves the answer by itself; fusing must not add to that."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(Qwen3Config(**{**tiny_options, "head_dim": 32}), source, own_init=True)
    config = QuantConfig(group_size=32, scale=False, clip="none", rounding="nearest")
    awq_core.quantize(source, out, config=config)
    # The interpreter would take the linears' kernel for minutes; it has tests of its own.
    monkeypatch.setenv("AWQ_KERNEL", "reference" if INTERPRETED else "triton")
    if INTERPRETED:
        monkeypatch.setattr(fused, "unfit", lambda needed, device: "")
        monkeypatch.setattr(fusing, "accelerated", lambda tensor: True)
    fast, plain = (load(out, device=DEVICE, dtype=dtype, fuse=fuse) for fuse in (True, False))
    assert "fused qkv, rotary, attention, gate-up, norms in 2 of 2 blocks" in capsys.readouterr().err
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    exact = logits(load(out, dtype=torch.float32))
    unavoidable = float((logits(plain) - exact).norm() / exact.norm())
    monkeypatch.setenv("AWQ_KERNEL", "triton")
    assert unavoidable < 2e-2
    assert float((logits(fast) - exact).norm() / exact.norm()) < 1.5 * unavoidable + 1e-4
