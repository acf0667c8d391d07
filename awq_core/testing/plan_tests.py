"""The tests of the conformance kit that need no checkpoint: the package, the plan of a tiny model, and the proof."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest

from awq_core.planning import manager_groups, stack_blocks
from awq_core.quantization.proof import prove
from awq_core.scale_groups import resolve_groups
from awq_core.testing import package
from awq_core.testing.diagnosis import diagnose
from awq_core.testing.subject import Subject

MIN_COVERAGE = 0.9
FUNCTION_TOLERANCE = 1e-4
CONTROL_MINIMUM = 1e-2
MOST_GROUPS = 4  # groups of a block that are kept in turn; of many experts the first will do


class PlanTests(Subject):
    """Inherited by `ArchitectureConformance`; cheap, so they run first."""

    # -- the package ------------------------------------------------------------------------------------------------

    def test_import_is_light(self) -> None:
        """If this fails: move imports of torch, transformers and awq_core.modules into the functions that use them.
        Every `awq` command imports every plugin."""
        heavy = package.loads(self.plugin)
        assert not heavy, f"importing {self.plugin} loads {len(heavy)} modules it does not need, first {heavy[0]}"

    def test_the_plugin_is_installed_and_loads(self) -> None:
        """If this fails: check `[project.entry-points."awq.plugins"]`, `pip install -e .`, and run `awq plugins
        doctor`. The entry point's name is the family's; the distribution is called awq-plugin-FAMILY."""
        families = {arch.family for arch in self.module.awq_architectures()}
        infos = [info for info in self.manager.plugins if set(info.families) & families]
        assert infos, f"no installed plugin brings {families}; is the package installed, with its entry point?"
        assert all(info.state == "ok" for info in infos), [info.error for info in infos]
        names = {info.name for info in infos}
        assert names == families, f"entry points {names} must have the names of the families, {families}"
        odd = package.misnamed(infos)
        assert not odd, f"{odd[0]} should be called {package.PREFIX}FAMILY, as users who look for it will guess"

    def test_hook_signatures(self) -> None:
        """If this fails: write the hook as docs/plugins/hooks.md has it; the message says the right form."""
        found = package.hook_problems(self.module)
        assert not found, "; ".join(found)

    def test_every_claim_is_declared_once(self) -> None:
        """If this fails: two Architecture values of this plugin claim one model type, and one hides the other."""
        found = package.twice([arch for arch in self.module.awq_architectures() if not arch.requires])
        assert not found, f"claimed twice: {found}; take it out of one Architecture"

    # -- each config ------------------------------------------------------------------------------------------------

    def test_claims_the_model(self, case: Any) -> None:
        """If this fails: add the model type to `model_types` of the right Architecture."""
        owner = self._owner(case)
        assert owner.arch in self.module.awq_architectures(), f"{case.model_type!r} belongs to {owner.label}"

    def test_block_count_is_the_configs(self, case: Any) -> None:
        """If this fails: `LayerStack.blocks` does not name the list of decoder layers."""
        blocks = [block for block in self._plan(case).blocks if block.component == "language"]
        depth = case.get_text_config().num_hidden_layers
        assert len(blocks) == depth, f"{len(blocks)} blocks were found, the configuration says {depth}"

    def test_every_path_resolves_in_every_block(self, case: Any) -> None:
        """If this fails: correct the path, or say `optional=True` where some blocks lack the group."""
        owner, skeleton = self._owner(case), self._skeleton(case)
        for stack in self.manager.layer_stacks(owner, skeleton):
            for path in stack.prelude:
                assert path in dict(skeleton.named_modules()), f"{stack.component}: prelude {path!r} is no module"
            blocks = list(stack_blocks(skeleton, stack))
            assert blocks, f"{stack.component}: {stack.blocks!r} has no blocks"
            for path, block, index in blocks:
                declared = manager_groups(self.manager, owner, skeleton, stack, block, index)
                resolve_groups(block, declared, where=path)  # raises PlanError, which names the path

    def test_readers_of_one_tensor_share_one_fate(self, case: Any) -> None:
        """If this fails: q, k and v (gate and up) must be readers in one ScaleGroup: engines fuse them, and a fused
        linear cannot be half quantized."""
        block = next(block for block in self._plan(case).blocks if block.component == "language")
        for group in block.groups[:MOST_GROUPS]:
            kept = f"{block.path}.{group.layers[0]}"
            plan = self._plan(case, modules_to_not_convert=(kept,))
            changed = next(one for one in plan.blocks if one.path == block.path)
            half = [one.name for one in changed.linears if changed.local(one) in group.layers and one.quantize]
            assert not half, f"with {kept} kept, {half[0]} is quantized; it reads the same tensor"

    def test_every_linear_is_grouped_or_exempt(self, case: Any) -> None:
        """If this fails: add the linear to a ScaleGroup (or to its `compensate`), or to `exempt` with the reason."""
        arch = self._owner(case).arch
        exempt = (*arch.exempt, *arch.keep)
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
        owner = self._owner(case)
        proof = prove(case, owner, self.manager)
        assert proof.groups, "no scale group resolves: AWQ would do nothing"
        if not proof.error <= FUNCTION_TOLERANCE:
            why = diagnose(case, owner, self.manager) or "only all groups together do; does one undo another?"
            pytest.fail(f"random scales move the outputs by {proof.error:.2g}: {why}")

    def test_negative_control_fails(self, case: Any) -> None:
        """If this fails: scaling readers alone changes nothing, so the proof proves nothing. Are the groups used?"""
        control = prove(case, self._owner(case), self.manager, fold_previous=False)
        assert control.error >= CONTROL_MINIMUM, f"the negative control moved the outputs by only {control.error:.2g}"
