"""The tests every architecture plugin inherits.

    class TestFalcon(ArchitectureConformance):
        plugin = "awq_plugin_falcon"

        @staticmethod
        def configs():
            return {"parallel": FalconConfig(hidden_size=64, ...), "new-decoder": FalconConfig(...)}

Each config is a tiny one (a few layers, 64 or so wide). Make them cover what the family varies: grouped-query and
multi-head attention, biases, tied embeddings, dense and mixture layers. No network, no GPU, about a second each.
Every assertion says what to do. An inherited test may be overridden only to mark it `xfail(reason=...)`.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open

from awq_core import api
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.config import QuantConfig
from awq_core.hooks.manager import Owner, PluginManager, default_manager
from awq_core.plan_types import Plan
from awq_core.planning import make_plan
from awq_core.quantization.proof import prove
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton
from awq_core.testing.tiny import save_tiny

MIN_COVERAGE = 0.9
FUNCTION_TOLERANCE = 1e-4
CONTROL_MINIMUM = 1e-2


class ArchitectureConformance:
    """Subclass, set `plugin`, give `configs`.

    Attributes:
        plugin: import name of the plugin package; its entry point must be installed.
        group_size: used for the quantize-and-load tests; must divide the tiny configs' widths.
    """

    plugin: ClassVar[str] = ""
    group_size: ClassVar[int] = 32

    @staticmethod
    def configs() -> dict[str, Any]:
        """Name -> tiny configuration."""
        raise NotImplementedError("return {name: tiny config}")

    @classmethod
    def awq_cases(cls) -> dict[str, Any]:
        """Read by the pytest plugin; no cases on the base class itself."""
        return cls.configs() if cls.plugin else {}

    @property
    def manager(self) -> PluginManager:
        return default_manager()

    def _owner(self, config: Any) -> Owner:
        return self.manager.owner(config)

    def _plan(self, config: Any, **options: Any) -> Plan:
        owner = self._owner(config)
        skeleton = build_skeleton(config)
        self.manager.prepare_model(owner, skeleton)
        return make_plan(skeleton, owner, self.manager, QuantConfig(group_size=self.group_size, **options))

    # -- the package ------------------------------------------------------------------------------------------------

    def test_importing_the_plugin_loads_no_torch(self) -> None:
        """If this fails: move imports of torch, transformers and awq_core.modules into the functions that use them."""
        code = f"import sys, {self.plugin}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "[]", f"importing {self.plugin} loads {out.stdout.strip()}"

    def test_the_plugin_is_installed_and_loads(self) -> None:
        """If this fails: check `[project.entry-points."awq.plugins"]` and run `awq plugins doctor`."""
        module = importlib.import_module(self.plugin)
        families = {arch.family for arch in module.awq_architectures()}
        infos = [info for info in self.manager.plugins if set(info.families) & families]
        assert infos, f"no installed plugin brings {families}; is the package installed, with its entry point?"
        assert all(info.state == "ok" for info in infos), [info.error for info in infos]
        assert {info.name for info in infos} == families, "the entry point's name must be the architecture's family"

    def test_every_claim_is_declared_once(self) -> None:
        """If this fails: two Architecture values of this plugin claim one model type, and one hides the other."""
        module = importlib.import_module(self.plugin)
        claims = [name for arch in module.awq_architectures() for name in (*arch.model_types, *arch.class_names)]
        assert len(claims) == len(set(claims)), f"claimed twice: {sorted({c for c in claims if claims.count(c) > 1})}"

    # -- each config ------------------------------------------------------------------------------------------------

    def test_claims_the_model(self, case: Any) -> None:
        """If this fails: add the model type to `model_types` of the right Architecture."""
        module = importlib.import_module(self.plugin)
        assert self._owner(case).arch in module.awq_architectures()

    def test_block_count_is_the_configs(self, case: Any) -> None:
        """If this fails: `LayerStack.blocks` does not name the list of decoder layers."""
        blocks = [block for block in self._plan(case).blocks if block.component == "language"]
        assert len(blocks) == case.get_text_config().num_hidden_layers

    def test_every_linear_is_grouped_or_exempt(self, case: Any) -> None:
        """If this fails: add the linear to a ScaleGroup (or to its `compensate`), or to `exempt` with the reason."""
        exempt = self._owner(case).arch.exempt
        for block in self._plan(case).blocks:
            if block.component != "language":
                continue
            named = {name for group in block.groups for name in (*group.layers, *group.compensate)}
            named |= {part.strip() for skip in block.skipped for part in skip.where.rpartition("->")[2].split(",")}
            for linear in block.linears:
                local = linear.name.removeprefix(block.path + ".")
                covered = local in named or any(fnmatch.fnmatch(local, pattern) for pattern in exempt)
                assert covered, f"{linear.name} is in no scale group"

    def test_coverage_of_parameters(self, case: Any) -> None:
        """If this fails: most weights would stay 16-bit. Stacked experts? Turn them into linears in
        `awq_prepare_model`."""
        coverage = self._plan(case).coverage
        assert coverage >= MIN_COVERAGE, f"only {coverage:.0%} of the block parameters would be quantized"

    def test_function_is_preserved(self, case: Any) -> None:
        """If this fails: a reader of some `prev` is missing from its group, or `norm_offset` is wrong."""
        proof = prove(case, self._owner(case), self.manager)
        assert proof.groups, "no scale group resolves: AWQ would do nothing"
        assert proof.error <= FUNCTION_TOLERANCE, f"random scales move the outputs by {proof.error:.2g}"

    def test_negative_control_fails(self, case: Any) -> None:
        """If this fails: scaling readers alone changes nothing, so the proof proves nothing. Are the groups used?"""
        control = prove(case, self._owner(case), self.manager, fold_previous=False)
        assert control.error >= CONTROL_MINIMUM, f"the negative control moved the outputs by only {control.error:.2g}"

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
            assert torch.isfinite(got).all()
            assert float((got - want).norm() / want.norm()) < 1e-4
            made = quantized.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert made.shape[0] == 2 and made.shape[1] > ids.shape[1]
        self._check_folder(case, source, out)

    def test_int4_kernel_agrees_in_bfloat16(self, case: Any, tmp_path: Path) -> None:
        """If this fails: a linear that is not quite an `nn.Linear` was replaced. Compare block by block.

        bf16 alone moves the outputs of a router or of a deep stack by more than 1e-2; a kernel may err twice as much.
        """
        source, out = tmp_path / "source", tmp_path / "out"
        save_tiny(case, source, dtype=torch.bfloat16, own_init=True)
        config = QuantConfig(group_size=self.group_size)
        api.quantize(source, out, config=config, calibration=CALIBRATION, samples=2, seq_len=32)
        ids = torch.randint(8, 60, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            exact = load(out, fake_quant=True, dtype=torch.float32)(input_ids=ids).logits
            got, plain = (load(out, fake_quant=fake)(input_ids=ids).logits.float() for fake in (False, True))
        error, own = (float((logits - exact).norm() / exact.norm()) for logits in (got, plain))
        assert error < max(1e-2, 2 * own)

    def _check_folder(self, case: Any, source: Path, out: Path) -> None:
        plan = self._plan(case)
        with CheckpointReader(source) as before, CheckpointReader(out) as after:
            packed = {name.removesuffix("qweight") for name in after.names if name.endswith(".qweight")}
            logical = {n for n in after.names if not n.endswith((".qweight", ".qzeros", ".scales"))}
            logical |= {base + "weight" for base in packed}
            assert logical == set(before.names), "names on disk must be the original checkpoint's"
            assert len(packed) == sum(linear.quantize for linear in plan.linears)
            for name in before.names:
                if any(part in name for part in ("vision", "visual", "projector")):
                    assert torch.equal(before.tensor(name), after.tensor(name)), f"{name} is kept but changed"
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        assert settings["quant_method"] == "awq" and settings["bits"] == 4 and settings["version"] == "gemm"
        for linear in plan.linears:
            kept = any(linear.name.startswith(prefix) for prefix in settings["modules_to_not_convert"])
            assert kept != linear.quantize, f"{linear.name}: modules_to_not_convert disagrees with the plan"
        for file in out.glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                assert handle.metadata() == {"format": "pt"}

    def test_no_inherited_test_is_overridden(self) -> None:
        """If this fails: remove the override, or mark it `@pytest.mark.xfail(reason=...)`."""
        for name in dir(ArchitectureConformance):
            mine, base = getattr(type(self), name), getattr(ArchitectureConformance, name)
            if name.startswith("test_") and mine is not base:
                marks = [mark for mark in getattr(mine, "pytestmark", []) if mark.name == "xfail"]
                assert any(mark.kwargs.get("reason") for mark in marks), f"{name} is overridden without a reason"


CALIBRATION = [
    "def add(a, b):\n    return a + b\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n" * 4,
    "The quick brown fox jumps over the lazy dog; 0123456789 times, or so they say.\n" * 4,
]
