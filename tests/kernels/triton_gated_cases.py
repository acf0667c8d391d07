"""A gated MLP whose activation runs in the product of gate and up. `test_triton.py` runs this file."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from awq_core.checkpoint.pack import PackedLinear
from awq_core.hooks.types import KernelBackend
from awq_core.kernels.triton import backend
from awq_core.kernels.triton.layout import interleave, interleave_halves, tile
from awq_core.kernels.triton.matmul import INTERPRETED
from awq_core.modules.gated import GatedProduct, merge_gated
from awq_core.modules.merged import Part
from awq_core.runtime.linear import QuantLinear

DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
TRITON = KernelBackend(
    name="triton", formats=("gemm",), devices=("cpu", "cuda"), factory="awq_core.kernels.triton.backend:TritonKernel"
)


def packed(case):
    return PackedLinear(*(getattr(case.packed, name).to(DEVICE) for name in ("qweight", "qzeros", "scales")))


@pytest.mark.parametrize(("inputs", "inner", "group"), [(128, 40, 32), (256, 64, 128), (96, 200, -1)])
def test_halves_in_turn_are_the_two_linears_in_turn(make, inputs, inner, group):
    gate, up = (packed(make(inputs, inner, group, seed=seed)) for seed in (1, 2))
    both = PackedLinear(*(torch.cat([getattr(one, name) for one in (gate, up)], 1) for name in PackedLinear.__slots__))
    got, want = interleave_halves(tile(both)), tile(interleave(gate, up))
    for name in ("tiles", "scales", "zeros"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


def mlp(make, dtype, bias=False, activation="silu", inner=40):
    """transformers' own, its gate and up merged; and what gate and up are exactly."""
    config = LlamaConfig(hidden_size=64, intermediate_size=inner, hidden_act=activation, mlp_bias=bias)
    module = LlamaMLP(config).to(dtype).to(DEVICE)
    gate, up = make(64, inner, 32, seed=1), make(64, inner, 32, seed=2)
    both = PackedLinear(
        *(torch.cat([getattr(packed(one), name) for one in (gate, up)], 1) for name in PackedLinear.__slots__)
    )
    added = torch.linspace(-1, 1, 2 * inner, device=DEVICE).to(dtype)
    merged = QuantLinear(both, added if bias else None, dtype, backends=(TRITON,))
    weight = torch.cat([gate.weight, up.weight]).to(DEVICE)
    return module, merged, weight, added.double() if bias else 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64), (0, 64)])
def test_the_activation_is_in_the_product(make, monkeypatch, shape, bias, dtype):
    module, merged, weight, added = mlp(make, dtype, bias)
    down = module.down_proj
    made = merge_gated(module, merged, {"gate_proj": 40, "up_proj": 40})
    assert made is module and isinstance(made, LlamaMLP) and isinstance(made.gated, GatedProduct)
    assert not hasattr(made, "gate_proj")
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)) / 8).to(dtype).to(DEVICE)
    gate, up = (x.double() @ weight.T + added).chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    unit = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(made.gated(x).double(), want, rtol=0.6 * unit, atol=1e-4)
        assert torch.equal(made(x), down(made.gated(x)))
        monkeypatch.setitem(backend.CROSSOVER, backend.device_class(DEVICE)[0], 1)
        torch.testing.assert_close(made.gated(x).double(), want, rtol=6 * unit, atol=12 * unit)
    x.requires_grad_()
    y = made.gated(x)
    torch.testing.assert_close(y.detach().double(), want, rtol=6 * unit, atol=12 * unit)
    y.sum().backward()
    assert x.grad.shape == x.shape and bool(x.grad.isfinite().all())


def test_the_compiler_sees_one_node(make):
    module, merged, _, _ = mlp(make, torch.float16)
    made = merge_gated(module, merged, {"gate_proj": 40, "up_proj": 40})
    x = torch.randn(3, 64, device=DEVICE).half()
    with torch.no_grad():
        assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))


def test_what_it_cannot_gate_is_merged(make):
    module, merged, _, _ = mlp(make, torch.float16, activation="gelu")
    assert isinstance(merge_gated(module, merged, {"gate_proj": 40, "up_proj": 40}).gate_proj, Part)
    module, merged, _, _ = mlp(make, torch.float16)
    assert isinstance(merge_gated(module, merged, {"up_proj": 40, "gate_proj": 40}).gate_proj, Part)
    module, merged, _, _ = mlp(make, torch.float16)
    assert isinstance(merge_gated(module, torch.nn.Linear(64, 80), {"gate_proj": 40, "up_proj": 40}).gate_proj, Part)

    class Other(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2

    module.__class__ = Other
    module.gate_proj = module.up_proj = torch.nn.Identity()
    assert isinstance(merge_gated(module, merged, {"gate_proj": 40, "up_proj": 40}).gate_proj, Part)
