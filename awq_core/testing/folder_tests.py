"""The tests of the conformance kit that write a checkpoint: what is quantized, saved and loaded computes the same.

tiny model --quantize--> folder --load--> the int4 kernels          compared with        the same, dequantized
                                --load, fuse=True--> merged modules                      the unfused model
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from awq_core import api
from awq_core.config import QuantConfig
from awq_core.modules import fusing
from awq_core.runtime import fused
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing.on_disk import check_folder
from awq_core.testing.plan_tests import PlanTests
from awq_core.testing.tiny import save_tiny

LOADED_TOLERANCE = 1e-4
FUSED_TOLERANCE = 1e-5
CALIBRATION = [
    "def add(a, b):\n    return a + b\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n" * 4,
    "The quick brown fox jumps over the lazy dog; 0123456789 times, or so they say.\n" * 4,
]


class FolderTests(PlanTests):
    """Inherited by `ArchitectureConformance`."""

    def test_quantize_save_load_generate(self, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """If this fails: the checkpoint does not load back into the same function. Compare the names on disk."""
        monkeypatch.setenv("AWQ_KERNEL", "reference")
        source, out = tmp_path / "source", tmp_path / "out"
        save_tiny(case, source)
        config = QuantConfig(group_size=self.group_size)
        api.quantize(source, out, config=config, calibration=CALIBRATION, samples=4, seq_len=32)
        quantized, expected = load(out), load(out, fake_quant=True)
        ids = torch.randint(8, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            got, want = quantized(input_ids=ids).logits, expected(input_ids=ids).logits
            assert torch.isfinite(got).all(), "the quantized model computes NaN or inf"
            error = float((got - want).norm() / want.norm())
            assert error < LOADED_TOLERANCE, f"the loaded model is {error:.2g} from its own weights, dequantized"
            made = quantized.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert made.shape[0] == 2 and made.shape[1] > ids.shape[1], "generate made no tokens"
        check_folder(self._plan(case), self._skeleton(case), source, out)

    def test_int4_kernel_agrees_in_bfloat16(self, case: Any, tmp_path: Path) -> None:
        """If this fails: a linear that is not quite an `nn.Linear` was replaced. Compare block by block.

        bf16 alone moves the outputs of a deep stack by more than 1e-2; a kernel may err twice as much. Where a router
        has a near tie, either may send a token elsewhere: the error is that of three tokens in four.
        """
        source, out = tmp_path / "source", tmp_path / "out"
        save_tiny(case, source, dtype=torch.bfloat16, own_init=True)
        config = QuantConfig(group_size=self.group_size)
        api.quantize(source, out, config=config, calibration=CALIBRATION, samples=2, seq_len=32)
        ids = torch.randint(8, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact = load(out, fake_quant=True, dtype=torch.float32)(input_ids=ids).logits
            got, plain = (load(out, fake_quant=fake)(input_ids=ids).logits.float() for fake in (False, True))
        moved = ((logits - exact).norm(dim=-1) / exact.norm(dim=-1) for logits in (got, plain))
        error, own = (float(tokens.flatten().quantile(0.75)) for tokens in moved)
        assert error < max(1e-2, 2 * own), f"off by {error:.2g}, bfloat16 alone by {own:.2g}"

    @pytest.mark.parametrize("everything", [False, True], ids=["here", "as-on-a-gpu"])
    def test_fused_equals_unfused(
        self, case: Any, everything: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If this fails: the parts of a `FusedBlock` do not read one tensor, or its factory's module computes something
        else. Let the factory raise `NotFusedError` where it is not exact."""
        monkeypatch.setenv("AWQ_KERNEL", "reference")
        declared = fused.declarations(build_skeleton(case), self._owner(case), self.manager, "reference")
        if not any(blocks for _, blocks in declared):
            pytest.skip("the architecture declares no fused blocks")
        source, out = tmp_path / "source", tmp_path / "out"
        save_tiny(case, source)
        config = QuantConfig(group_size=self.group_size, scale=False, clip="none", rounding="nearest")
        api.quantize(source, out, config=config)
        plain = load(out)
        if everything:  # what is for GPUs, in plain torch
            monkeypatch.setattr(fused, "unfit", lambda needed, device: "")
            monkeypatch.setattr(fusing, "accelerated", lambda tensor: True)
        fast = load(out, fuse=True)
        assert any(type(a) is not type(b) for a, b in zip(plain.modules(), fast.modules(), strict=False)), (
            "nothing was fused: the line on stderr says why"
        )
        ids = torch.randint(8, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0  # padding on the left
        with torch.no_grad():
            got, want = (model(input_ids=ids, attention_mask=mask).logits for model in (fast, plain))
            error = float((got - want).norm() / want.norm())
            assert error < FUSED_TOLERANCE, f"the fused model is {error:.2g} from the unfused one"
            for cache in self.caches:
                options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
                made, expected = (
                    model.generate(input_ids=ids, attention_mask=mask, **options) for model in (fast, plain)
                )
                assert torch.equal(made, expected), f"other tokens with a {cache} cache"
