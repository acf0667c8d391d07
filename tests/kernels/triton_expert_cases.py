"""The experts of a mixture on Triton, together and one by one. `test_triton.py` runs this file."""

import pytest
import torch

from awq_core.checkpoint.pack import PackedLinear
from awq_core.hooks.types import KernelBackend
from awq_core.kernels.triton import backend
from awq_core.kernels.triton.matmul import INTERPRETED
from awq_core.modules import UnstackedExperts
from awq_core.runtime.grouped import group_experts
from awq_core.runtime.linear import QuantLinear

DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
# The real one is declared for GPUs.
TRITON = KernelBackend(
    name="triton", formats=("gemm",), devices=("cpu", "cuda"), factory="awq_core.kernels.triton.backend:TritonKernel"
)


def mixture(make, experts, hidden, inner, dtype, group=64):
    """`UnstackedExperts` of quantized linears, and each expert's three exact weights."""
    module = UnstackedExperts(experts, hidden, inner, torch.nn.SiLU(), ("w1", "w3", "w2"))
    weights = []
    for expert in range(experts):
        sizes = {"w1": (hidden, inner), "w3": (hidden, inner), "w2": (inner, hidden)}
        cases = [make(*size, group, seed=10 * expert + at) for at, size in enumerate(sizes.values())]
        for name, case in zip(sizes, cases, strict=True):
            packed = PackedLinear(*(getattr(case.packed, one).to(DEVICE) for one in ("qweight", "qzeros", "scales")))
            module.set_submodule(f"{expert}.{name}", QuantLinear(packed, None, dtype, backends=(TRITON,)))
        weights.append([case.weight.to(DEVICE) for case in cases])
    return module, weights


def exact(x, choices, gates, weights):
    """Token by token in float64."""
    x, out = x.double(), torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (experts, shares) in enumerate(zip(choices.tolist(), gates.double(), strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up, down = weights[expert]
            out[token] += share * (down @ (torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])))
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 6), (7, 2, 4), (40, 1, 2), (3, 3, 3), (0, 2, 4)])
@pytest.mark.parametrize("crossover", [256, 3])
def test_together_is_one_by_one(make, monkeypatch, tokens, top_k, experts, dtype, crossover):
    monkeypatch.setitem(backend.CROSSOVER, backend.device_class(DEVICE)[0], crossover)
    module, weights = mixture(make, experts, 128, 64, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = (torch.randn(tokens, 128, generator=generator) / 32).to(dtype).to(DEVICE)
    choices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].to(DEVICE)
    gates = torch.rand(tokens, top_k, generator=generator).to(DEVICE)
    with torch.no_grad():
        alone = module(x, choices, gates)
        assert group_experts(torch.nn.ModuleList([module])) == 1 and group_experts(module) == 0
        together = module(x, choices, gates)
        assert torch.equal(alone, _loop(module, x, choices, gates)), "the experts' own linears are still right"
    assert together.dtype == dtype and together.shape == x.shape
    want = exact(x, choices, gates, weights)
    unit = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    for got in (alone, together):
        torch.testing.assert_close(
            got.double(), want, rtol=4 * unit, atol=4 * unit * float(want.abs().amax() if tokens else 0)
        )


def _loop(module, x, choices, gates):
    """One by one, with the linears that are views of a stack."""
    kept, module.together = module.together, None
    try:
        return module(x, choices, gates)
    finally:
        module.together = kept


def test_nothing_is_held_twice(make):
    module, _ = mixture(make, 3, 128, 64, torch.float16)
    group_experts(module)
    for name, grouped in zip(module.names, module.together, strict=True):
        for expert in range(3):
            own = module.get_submodule(f"{expert}.{name}").state()
            for part in ("tiles", "scales", "zeros"):
                assert own[part].untyped_storage().data_ptr() == getattr(grouped, part).untyped_storage().data_ptr()
    assert not module.state_dict()


def test_the_compiler_goes_through_them(make):
    module, _ = mixture(make, 4, 128, 64, torch.float16)
    group_experts(module)
    x, choices = torch.randn(5, 128, device=DEVICE).half() / 32, torch.arange(10, device=DEVICE).view(5, 2) % 4
    gates = torch.rand(5, 2, device=DEVICE)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, choices, gates), module(x, choices, gates))
