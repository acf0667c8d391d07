"""Experts together: with a made-up kernel that does it in plain torch. On Triton: `kernels/triton_expert_cases.py`."""

import pytest
import torch

from awq_core import kernels
from awq_core.checkpoint.pack import pack_linear
from awq_core.hooks.types import KernelBackend
from awq_core.kernels.reference import ReferenceKernel
from awq_core.modules import UnstackedExperts
from awq_core.runtime.fused import prefer_graphs
from awq_core.runtime.grouped import group_experts
from awq_core.runtime.linear import QuantLinear


class Grouping(ReferenceKernel):
    """The reference, with the three methods, and a note of each call."""

    calls = 0

    def stack(self, states):
        return {name: torch.stack([one[name] for one in states]) for name in states[0]}

    def unstack(self, state, expert):
        return {name: tensor[expert] for name, tensor in state.items()}

    def grouped_linear(self, x, state, choices):
        Grouping.calls += 1
        rows = x if len(x) == choices.numel() else x.repeat_interleave(choices.shape[1], 0)
        pairs = zip(rows, choices.flatten().tolist(), strict=True)
        return torch.cat([self.linear(row[None], self.unstack(state, expert)) for row, expert in pairs])


def backend(name):
    return KernelBackend(name=name, formats=("gemm",), devices=("cpu",), factory=name)


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    monkeypatch.setattr(kernels, "_MADE", {"grouping": Grouping(), "plain": ReferenceKernel()})
    Grouping.calls = 0


def quantized(inputs, outputs, seed, name, bias=None):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
    scales = torch.rand(outputs, inputs // 32, generator=generator) / 50
    packed = pack_linear(codes, scales, torch.full(scales.shape, 8))
    return QuantLinear(packed, bias, torch.float32, backends=(backend(name),))


def mixture(name="grouping"):
    module = UnstackedExperts(3, 64, 32, torch.nn.SiLU())
    for expert in range(3):
        for at, (leaf, size) in enumerate(zip(module.names, ((64, 32), (64, 32), (32, 64)), strict=True)):
            module.set_submodule(f"{expert}.{leaf}", quantized(*size, 3 * expert + at, name))
    return module


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
CHOICES = torch.tensor([[0, 2], [2, 1], [1, 0], [2, 0], [2, 1]])
GATES = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))


def test_together_is_one_by_one():
    module = mixture()
    with torch.no_grad():
        alone = module(X, CHOICES, GATES)
        assert Grouping.calls == 0
        assert group_experts(torch.nn.Sequential(module)) == 1
        together = module(X, CHOICES, GATES)
    assert Grouping.calls == 3
    torch.testing.assert_close(together, alone)


def test_training_and_calibration_run_them_one_by_one():
    module = mixture()
    group_experts(module)
    x = X.clone().requires_grad_()
    module(x, CHOICES, GATES).sum().backward()
    assert x.grad.abs().sum() > 0 and Grouping.calls == 0
    seen = []
    module.get_submodule("1.down_proj").register_forward_hook(lambda *_: seen.append(1))
    module.calibrating = ("1",)
    with torch.no_grad():
        module(X, CHOICES, GATES)
    assert seen == [1] and Grouping.calls == 0


def test_what_cannot_be_stacked_stays():
    assert group_experts(mixture("plain")) == 0
    assert group_experts(UnstackedExperts(2, 64, 32, torch.nn.SiLU())) == 0  # not quantized
    one = mixture()
    one.set_submodule("1.up_proj", torch.nn.Linear(64, 32, bias=False))  # a layer kept as it was
    other = mixture()
    other.set_submodule("0.down_proj", quantized(32, 64, 1, "grouping", torch.zeros(64)))
    third = mixture()
    third.set_submodule("2.gate_proj", quantized(64, 32, 1, "plain"))
    for module in (one, other, third):
        with torch.no_grad():
            assert group_experts(module) == 0 and module(X, CHOICES, GATES).isfinite().all()
    assert Grouping.calls == 0


def test_graphs_are_captured_where_experts_run_together():
    class Model(torch.nn.Module):
        device, _can_compile_fullgraph = torch.device("cuda"), True

    model = Model()
    model.experts = mixture()
    model.generation_config = type("Config", (), {"cache_implementation": None})()
    prefer_graphs(model)
    assert model.generation_config.cache_implementation is None
    group_experts(model)
    prefer_graphs(model)
    assert model.generation_config.cache_implementation == "static"
