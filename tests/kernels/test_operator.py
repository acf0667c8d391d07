"""`awq::linear`: one node to the compiler and to export, and a gradient that is the dequantized product's."""

import pytest
import torch

from awq_core import kernels
from awq_core.checkpoint.pack import dequantize
from awq_core.errors import ConfigError
from awq_core.kernels import operator
from awq_core.kernels.reference import ReferenceKernel
from awq_core.runtime.linear import QuantLinear

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
RUNS = [("reference", torch.float32), ("int4pack", torch.bfloat16), ("cpu", torch.bfloat16), ("cpu", torch.float32)]


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def activations(*sizes, dtype=torch.float32):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture(params=RUNS, ids=lambda one: f"{one[0]}-{one[1]}")
def linear(request, make, monkeypatch):
    """A `QuantLinear` of each backend that runs here, and its exact weight."""
    name, dtype = request.param
    case = make(128, 48, 32)
    monkeypatch.setenv("AWQ_KERNEL", name)
    try:
        made = QuantLinear(case.packed, torch.linspace(-1, 1, 48), dtype)
    except ConfigError as error:
        pytest.skip(str(error))
    assert made.backend == name
    torch.compiler.reset()  # or each test counts as a recompilation of the last one's
    return made, case.weight


@pytest.mark.parametrize("sizes", [(128,), (1, 128), (5, 128), (2, 3, 128), (0, 128), (2, 0, 128)])
def test_it_takes_any_number_of_dimensions(linear, sizes):
    module, weight = linear
    x = activations(*sizes, dtype=module.weight_dtype)
    got = module(x)
    assert got.shape == (*sizes[:-1], 48) and got.dtype == x.dtype
    if got.numel():
        want = x.double() @ weight.T + torch.linspace(-1, 1, 48).double()
        assert apart(got, want) < TOLERANCE[module.weight_dtype]


def test_the_compiler_sees_one_node(linear):
    module, _ = linear
    seen = []

    def backend(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for rows in (3, 5, 40):
        x = activations(rows, 128, dtype=module.weight_dtype)
        assert torch.equal(compiled(x), module(x))
    assert all(nodes.count(torch.ops.awq.linear) + nodes.count(torch.ops.awq.linear.default) == 1 for nodes in seen)


def test_the_whole_compiler_takes_it_gradients_included(linear):
    """AOTAutograd traces forward and backward with fake tensors, which no kernel could read."""
    module, _ = linear
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        x = activations(4, 128, dtype=module.weight_dtype).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert apart(results[0][1], results[1][1]) < 1e-2  # the sums of squares may be rounded elsewhere


@pytest.mark.parametrize("strict", [True, False])
def test_it_is_exported(linear, strict):
    module, _ = linear
    rows = torch.export.Dim("rows", min=2, max=64)
    example = (activations(4, 128, dtype=module.weight_dtype),)
    program = torch.export.export(module, example, dynamic_shapes={"x": {0: rows}}, strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.awq.linear.default) == 1
    for count in (2, 4, 33):
        x = activations(count, 128, dtype=module.weight_dtype)
        assert torch.equal(program.module()(x), module(x))


def test_the_gradient_is_that_of_the_dequantized_product(linear):
    module, weight = linear
    x = activations(2, 3, 128, dtype=module.weight_dtype).requires_grad_()
    dy = activations(2, 3, 48, dtype=module.weight_dtype)
    module(x).backward(dy)
    dense = activations(2, 3, 128).double().requires_grad_()
    (dense @ weight.T).backward(dy.double())
    assert x.grad.dtype == x.dtype and x.grad.shape == x.shape
    assert apart(x.grad, dense.grad) < TOLERANCE[module.weight_dtype]


def test_small_differences_agree_with_the_gradient(make, monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    module = QuantLinear(make(32, 16, 32).packed, None, torch.float32)
    x = activations(2, 32).requires_grad_()
    # Linear, so wide steps are as exact as narrow ones, and fp32 is enough.
    numeric = torch.stack([(module(x + 0.5 * one) - module(x - 0.5 * one)).sum() for one in _units(x)])
    module(x).sum().backward()
    torch.testing.assert_close(numeric.reshape(x.shape), x.grad, rtol=1e-3, atol=1e-3)


def _units(x):
    return torch.eye(x.numel()).reshape(-1, *x.shape)


def test_torch_finds_nothing_wrong_with_the_operator(linear):
    module, _ = linear
    state = [getattr(module, name) for name in module.state_names]
    x = activations(3, 128, dtype=module.weight_dtype).requires_grad_()
    arguments = (x, state, module.state_names, module.factory, 48, module.bias)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(torch.ops.awq.linear.default, arguments, test_utils=tests).values()) == {"SUCCESS"}
    backward = (activations(3, 48, dtype=module.weight_dtype), *arguments[1:4], 128)
    torch.library.opcheck(torch.ops.awq.linear_grad.default, backward, test_utils=tests[:2])


def test_adapters_train_on_top_of_it(make):
    """What the gradient is for: something before the frozen layer learns."""
    module = QuantLinear(make(64, 16, 32).packed, None, torch.float32)
    adapter = torch.nn.Linear(64, 64)
    x, target = activations(8, 64), activations(8, 16)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = (module(adapter(x)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_kernel_of_another_process_is_made_when_it_is_asked_for(monkeypatch, make):
    monkeypatch.setattr(kernels, "_MADE", {})
    factory = "awq_core.kernels.reference:ReferenceKernel"
    assert isinstance(kernels.instance(factory), ReferenceKernel)
    packed = make(64, 16, 32).packed
    x, state = activations(2, 64), ReferenceKernel().prepare(packed, torch.float32)
    got = operator.linear(x, list(state.values()), list(state), factory, 16)
    torch.testing.assert_close(got, x @ dequantize(packed).T)


class Adding(ReferenceKernel):
    """A kernel that adds the bias itself, and shows it by adding it twice."""

    def linear_bias(self, x, state, bias):
        return self.linear(x, state) + 2 * bias


@pytest.mark.parametrize(("kernel", "times"), [(ReferenceKernel, 1), (Adding, 2)])
def test_a_kernel_that_can_adds_the_bias_itself(monkeypatch, make, kernel, times):
    monkeypatch.setattr(kernels, "_MADE", {"here": kernel()})
    case = make(64, 16, 32)
    x, bias, state = activations(2, 64).requires_grad_(), activations(16), kernel().prepare(case.packed, torch.float32)
    got = operator.linear(x, list(state.values()), list(state), "here", 16, bias.double())
    assert got.dtype == x.dtype and apart(got.detach(), x.detach().double() @ case.weight.T + times * bias) < 1e-5
    got.sum().backward()
    assert apart(x.grad, case.weight.sum(0).expand(2, -1)) < 1e-5


def test_a_factory_that_is_not_there_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "_MADE", {})
    with pytest.raises(ConfigError, match="awq_nowhere:Kernel failed: ModuleNotFoundError"):
        kernels.instance("awq_nowhere:Kernel")
    assert "not used" in capsys.readouterr().err
