"""The Triton kernels against sums in float64. `test_triton.py` runs this file, in Triton's interpreter or on a GPU."""

import pytest
import torch
import triton
import triton.language as tl

from awq_core.checkpoint.pack import dequantize as unpacked
from awq_core.checkpoint.pack import pack_linear
from awq_core.kernels import operator
from awq_core.kernels.triton import backend, tune
from awq_core.kernels.triton.dequantize import dequantize
from awq_core.kernels.triton.grouped import grouped_matmul, route, stack, tile_for
from awq_core.kernels.triton.layout import interleave, tile
from awq_core.kernels.triton.matmul import INTERPRETED, _counters, _stream, matmul
from awq_core.kernels.triton.planes import codes_of, zero_of
from awq_core.kernels.triton.tiles import Tile

DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
FACTORY = "awq_core.kernels.triton.backend:TritonKernel"
DTYPES = (torch.float16, torch.bfloat16)
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}


def on_device(packed):
    return type(packed)(*(getattr(packed, name).to(DEVICE) for name in ("qweight", "qzeros", "scales")))


def tiled(packed):
    return tile(on_device(packed))


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def check(y, x, weight, extra=0.0):
    """Every element to the rounding of its dtype and of sums in fp32."""
    x, weight = x.double().cpu(), weight.double()
    want = x @ weight.T + extra
    size = x.abs() @ weight.abs().T + (extra.abs() if isinstance(extra, torch.Tensor) else 0)
    allowed = 0.51 * ULP[y.dtype] * want.abs() + 2e-6 * size + 6e-8
    wrong = (y.double().cpu() - want).abs() - allowed
    assert not bool(y.isnan().any()) and float(wrong.max()) <= 0, f"off by {float(wrong.max()):.3g} more than allowed"


@pytest.fixture(autouse=True)
def poisoned():
    """Every `torch.empty` is full of NaN: outputs and partial sums that are read before they are written show."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "group", "work"),
    [
        (1, 256, 128, 128, Tile(128, 8, 1, 4, 4)),
        (5, 384, 72, 128, Tile(64, 8, 2, 2, 4)),  # columns and tokens that fill no tile
        (3, 192, 64, 64, Tile(64, 8, 1, 2, 4)),  # inputs that end inside a block
        (17, 256, 64, 64, Tile(64, 16, 2, 2, 4)),  # two blocks of tokens
        (2, 96, 8, 32, Tile(64, 8, 1, 2, 4)),
        (9, 416, 136, 32, Tile(64, 16, 3, 2, 4)),  # a split that does not divide the blocks
        (4, 96, 24, -1, Tile(64, 8, 1, 2, 4)),
        (33, 512, 64, -1, Tile(64, 64, 4, 4, 3)),
        (2, 256, 200, 128, Tile(128, 8, 2, 4, 4)),  # four tiles of 64 rows, the last one partly filled
        (2, 256, 64, 128, Tile(128, 8, 2, 4, 4)),  # one tile of 64 rows: halved
        (1, 128, 64, 128, Tile(64, 8, 4, 2, 4)),  # programs that have nothing to do
    ],
)
def test_the_product(make, tokens, inputs, outputs, group, work, dtype):
    case = make(inputs, outputs, group)
    x = random(tokens, inputs, dtype=dtype)
    weight = tiled(case.packed)
    y = matmul(x, weight, tile=work)
    assert y.dtype == dtype and y.shape == (tokens, outputs)
    check(y, x, case.weight)
    again = matmul(x, weight, tile=work)
    assert torch.equal(y.view(torch.int16), again.view(torch.int16)), "two runs differ"
    assert not _counters(DEVICE, _stream(DEVICE)).any(), "a counter was left standing"


@pytest.mark.parametrize("scales", DTYPES)
def test_scales_keep_their_own_dtype(make, scales):
    case = make(128, 64, 64, dtype=scales)
    x = random(3, 128, dtype=torch.bfloat16)
    check(matmul(x, tiled(case.packed)), x, case.weight)


@pytest.mark.parametrize(("scale", "dtype"), [(65504.0, torch.bfloat16), (6e-8, torch.float16), (0.0, torch.float16)])
@pytest.mark.parametrize(("code", "zero"), [(0, 15), (15, 0), (15, 15), (0, 0)])
def test_extremes(scale, dtype, code, zero):
    codes = torch.full((64, 128), code)
    packed = pack_linear(codes, torch.full((64, 2), scale), torch.full((64, 2), zero))
    weight = (code - zero) * packed.scales[0, 0].double() * torch.ones(64, 128, dtype=torch.float64)
    x = random(2, 128, dtype=dtype)
    check(matmul(x, tiled(packed)), x, weight)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_residual_are_added_before_the_one_rounding(make, split, dtype):
    case = make(256, 72, 64)
    x, bias, residual = (random(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(3, 256), (72,), (3, 72)]))
    y = matmul(x, tiled(case.packed), bias=bias, residual=residual, tile=Tile(64, 8, split, 2, 4))
    check(y, x, case.weight, bias.double().cpu() + residual.double().cpu())


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_interleaved_rows(make, split, dtype):
    gate, up = make(256, 40, 128, seed=3), make(256, 40, 128, seed=4)
    x = random(5, 256, dtype=dtype) / 8
    bias, residual = random(80, seed=5), random(5, 40, seed=6)
    weight = tiled(interleave(gate.packed, up.packed))
    y = matmul(x, weight, bias=bias, residual=residual, swiglu=True, tile=Tile(64, 8, split, 2, 4))
    a = x.double().cpu() @ gate.weight.T + bias.double().cpu()[::2]
    b = x.double().cpu() @ up.weight.T + bias.double().cpu()[1::2]
    want = torch.nn.functional.silu(a) * b + residual.double().cpu()
    assert y.shape == (5, 40)
    torch.testing.assert_close(y.double().cpu(), want, rtol=0.6 * ULP[dtype], atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (128,), (2, 3, 128), (1, 2, 2, 128)])
def test_any_shape_of_input(make, shape):
    case = make(128, 24, 32)
    x = random(*shape, dtype=torch.float16)
    y = matmul(x, tiled(case.packed))
    assert y.shape == (*shape[:-1], 24)
    if y.numel():
        check(y.reshape(-1, 24), x.reshape(-1, 128), case.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_the_input_is_read(make, dtype):
    """Rows of a wider matrix, with NaN to their right, and NaN in the rows after the last."""
    case = make(160, 16, 32)
    wide = torch.full((8, 256), float("nan"), dtype=dtype, device=DEVICE)
    wide[:3, :160] = random(3, 160, dtype=dtype)
    x = wide[:3, :160]
    check(matmul(x, tiled(case.packed)), x, case.weight)
    columns = x.T.contiguous().T
    assert torch.equal(matmul(x, tiled(case.packed)), matmul(columns, tiled(case.packed)))


def test_an_input_that_does_not_fit_is_an_error(make):
    with pytest.raises(ValueError, match="x has 300 inputs"):
        matmul(random(1, 300, dtype=torch.float16), tiled(make(128, 8, 32).packed))
    with pytest.raises(ValueError, match="float32; float16 or bfloat16"):
        matmul(random(1, 128), tiled(make(128, 8, 32).packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "inputs", "group", "work"),
    [
        (5, 2, 4, 256, 128, Tile(64, 8, 1, 2, 4)),
        (1, 4, 8, 160, 32, Tile(64, 8, 2, 2, 4)),  # most experts see nothing
        (20, 1, 2, 192, 64, Tile(128, 8, 1, 4, 4)),  # several blocks for one expert
        (3, 2, 3, 96, -1, Tile(64, 16, 2, 2, 4)),
        (0, 2, 3, 256, 128, Tile(64, 8, 1, 2, 4)),
    ],
)
def test_the_product_over_experts(make, tokens, top_k, experts, inputs, group, work, dtype):
    cases = [make(inputs, 72, group, seed=seed) for seed in range(experts)]
    weight = stack([tiled(case.packed) for case in cases])
    generator = torch.Generator().manual_seed(tokens)
    choices = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    x = random(tokens, inputs, dtype=dtype)
    routing = route(choices.to(DEVICE), experts, work.tokens)
    y = grouped_matmul(x, weight, routing, work)
    assert y.shape == (tokens * top_k, 72)
    for pair, expert in enumerate(choices.flatten().tolist()):
        token = pair // top_k
        check(y[pair : pair + 1], x[token : token + 1], cases[expert].weight)
    again = grouped_matmul(x.repeat_interleave(top_k, 0), weight, routing, work)
    assert torch.equal(again, y), "a row for each pair"


def test_swiglu_over_experts(make):
    cases = [(make(128, 40, 64, seed=seed), make(128, 40, 64, seed=seed + 9)) for seed in range(3)]
    weight = stack([tiled(interleave(gate.packed, up.packed)) for gate, up in cases])
    x, choices = random(4, 128, dtype=torch.float16) / 8, torch.tensor([[0], [2], [2], [0]])
    work = tile_for(DEVICE, x.dtype, weight, 4)
    y = grouped_matmul(x, weight, route(choices.to(DEVICE), 3, work.tokens), work, swiglu=True)
    for token, expert in enumerate(choices.flatten().tolist()):
        gate, up = (x[token].double().cpu() @ case.weight.T for case in cases[expert])
        torch.testing.assert_close(
            y[token].double().cpu(), torch.nn.functional.silu(gate) * up, rtol=1e-3, atol=1e-4, msg=f"token {token}"
        )


def test_pairs_are_sorted_into_blocks_of_one_expert():
    choices = torch.tensor([[3, 1], [1, 0], [1, 3], [1, 3]], device=DEVICE)
    routing = route(choices, 5, 2)
    assert routing.experts.tolist() == [0, 1, 1, 3, 3, -1, -1, -1, -1]
    assert routing.pairs.tolist()[:10] == [3, 8, 1, 2, 4, 6, 0, 5, 7, 8]
    assert set(routing.pairs.tolist()[10:]) == {8}


def test_a_routing_that_does_not_fit_is_an_error(make):
    weight = stack([tiled(make(128, 8, 32).packed)] * 2)
    routing, x = route(torch.tensor([[0], [1]], device=DEVICE), 2, 8), random(3, 128, dtype=torch.float16)
    with pytest.raises(ValueError, match="3 rows for 2 tokens"):
        grouped_matmul(x, weight, routing, Tile(64, 8, 1, 2, 4))
    with pytest.raises(ValueError, match="blocks of 8"):
        grouped_matmul(x[:2], weight, routing, Tile(64, 16, 1, 2, 4))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(256, 64, 128), (192, 72, 64), (96, 8, 32), (160, 136, -1)])
def test_dequantize_is_what_the_format_says(make, inputs, outputs, group, dtype):
    packed = make(inputs, outputs, group).packed
    assert torch.equal(dequantize(tiled(packed), inputs, dtype).cpu(), unpacked(packed, dtype))


# -- one plane of words -----------------------------------------------------------------------------------------------


@triton.jit
def plane_kernel(
    words_ptr, zeros_ptr, codes_ptr, offsets_ptr, PLANE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr
):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    codes = codes_of(tl.load(words_ptr + at), PLANE, BF16, ASM)
    tl.store(codes_ptr + at, codes.to(tl.int16, bitcast=True))
    tl.store(offsets_ptr + at, zero_of(tl.load(zeros_ptr + at), PLANE, BF16).to(tl.int16, bitcast=True))


@pytest.mark.parametrize(
    "assembly", [False, pytest.param(True, marks=pytest.mark.skipif(INTERPRETED, reason="no GPU"))]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", range(4))
def test_a_plane_of_every_word(plane, dtype, assembly):
    words = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16)
    zeros = (torch.arange(2**16, device=DEVICE) % 16).to(torch.uint8)
    codes, offsets = torch.zeros_like(words), torch.zeros_like(words)
    plane_kernel[(64,)](words, zeros, codes, offsets, PLANE=plane, BF16=dtype is torch.bfloat16, ASM=assembly)
    difference = codes.view(dtype).double() - offsets.view(dtype).double()
    want = ((words.long() >> (4 * plane)) & 15) - zeros.long()
    assert torch.equal(difference, want.double())


# -- tuning -----------------------------------------------------------------------------------------------------------


def test_a_tile_is_timed_where_its_result_is_right(monkeypatch):
    """With a clock that is made up; the products are real."""
    shape = tune.Shape(72, 160, 32)
    weight = tune.random_weight(shape, torch.float16, DEVICE)
    calls = []
    timer = lambda call: calls.append(call()) or 0.5  # noqa: E731
    measure = tune.measurer(weight, shape, 5, torch.float16, timer)
    torch.use_deterministic_algorithms(False)
    assert measure(Tile(64, 8, 2, 2, 4)) == 0.5 and calls[0].shape == (5, 72)
    wrong = lambda *a, **b: matmul(*a, **b) * 1.02  # noqa: E731
    monkeypatch.setattr("awq_core.kernels.triton.matmul.matmul", wrong)
    assert tune.measurer(weight, shape, 5, torch.float16, timer)(Tile(64, 8, 2, 2, 4)) == float("inf")
    monkeypatch.setattr("awq_core.kernels.triton.matmul.matmul", lambda *a, **b: matmul(*a, **b) * float("nan"))
    assert tune.measurer(weight, shape, 5, torch.float16, timer)(Tile(64, 8, 2, 2, 4)) == float("inf")


# -- the backend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backend_changes_over_at_many_tokens(make, dtype, monkeypatch):
    case = make(128, 40, 64)
    packed, kernel = on_device(case.packed), backend.TritonKernel()
    assert kernel.unsupported(packed, dtype) == ""
    state = kernel.prepare(packed, dtype)
    assert torch.equal(kernel.dequantize(state, dtype).cpu(), unpacked(case.packed, dtype))
    monkeypatch.setitem(backend.CROSSOVER, backend.device_class(DEVICE)[0], 6)
    torch.use_deterministic_algorithms(False)
    for tokens in (0, 1, 5, 6, 7):
        x = random(tokens, 128, dtype=dtype)
        y = kernel.linear(x, state)
        assert y.dtype == dtype and y.shape == (tokens, 40)
        want = x.cpu().double() @ case.weight.T
        torch.testing.assert_close(y.double().cpu(), want, rtol=2 * ULP[dtype], atol=0.1 if tokens > 5 else 1e-2)
        bias = random(40, seed=2, dtype=dtype)
        biased = operator.linear(x, list(state.values()), list(state), FACTORY, 40, bias)
        want += bias.cpu().double()
        torch.testing.assert_close(biased.double().cpu(), want, rtol=2 * ULP[dtype], atol=0.1 if tokens > 5 else 1e-2)
    used = []
    monkeypatch.setattr(backend, "dequantize", lambda *a: used.append(a) or dequantize(*a))
    kernel.linear(random(5, 128, dtype=dtype), state)
    assert not used
    kernel.linear(random(2, 3, 128, dtype=dtype), state)
    assert len(used) == 1


@pytest.mark.parametrize("inputs", [128, 96])
def test_the_backend_behind_the_operator(make, inputs):
    """As a `QuantLinear` calls it, with the gradient of the input."""
    case = make(inputs, 40, 32)
    state = backend.TritonKernel().prepare(on_device(case.packed), torch.float16)
    x = random(3, inputs, dtype=torch.float16).requires_grad_()
    bias = random(40, seed=3, dtype=torch.float16)
    y = operator.linear(x, list(state.values()), list(state), FACTORY, 40, bias)
    check(y.detach(), x.detach(), case.weight, bias.double().cpu())
    dy = random(3, 40, seed=2, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)
    y.backward(dy)
    want = dy.double().cpu() @ case.weight
    torch.testing.assert_close(x.grad.double().cpu(), want, rtol=2e-3, atol=2e-2)


def test_two_streams_never_share_counters():
    first, second = _counters(DEVICE, 123456), _counters(DEVICE, 123457)
    assert first.data_ptr() != second.data_ptr() and _counters(DEVICE, 123456) is first


def test_the_backend_says_what_it_cannot_do(make, monkeypatch):
    kernel = backend.TritonKernel()
    packed = on_device(make(64, 8, 32).packed)
    assert "float32 activations" in kernel.unsupported(packed, torch.float32)
    assert "group size 16" in kernel.unsupported(on_device(make(64, 8, 16).packed), torch.float16)
    monkeypatch.setattr(backend, "INTERPRETED", not INTERPRETED)
    why = kernel.unsupported(packed, torch.float16)
    assert ("no GPU" if INTERPRETED else "TRITON_INTERPRET") in why


@pytest.mark.skipif(INTERPRETED, reason="needs programs that run at the same time")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hundred_runs_on_a_gpu_are_the_same(make, dtype):
    case = make(4096, 512, 128)
    weight, x = tiled(case.packed), random(7, 4096, dtype=dtype)
    first = matmul(x, weight, tile=Tile(64, 8, 8, 2, 4))
    check(first, x, case.weight)
    assert all(torch.equal(first, matmul(x, weight, tile=Tile(64, 8, 8, 2, 4))) for _ in range(100))


@pytest.mark.skipif(INTERPRETED, reason="a graph is of a GPU")
def test_a_captured_graph_replays(make):
    case = make(1024, 256, 128)
    weight, x = tiled(case.packed), random(4, 1024, dtype=torch.float16)
    work = Tile(64, 8, 4, 2, 4)
    stream = torch.cuda.Stream()
    matmul(x, weight, tile=work)  # compiled; on another stream, so the captured one takes a set of counters of its own
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = matmul(x, weight, tile=work)
    for seed in (7, 8):
        x.copy_(random(4, 1024, seed=seed, dtype=torch.float16))
        graph.replay()
        torch.cuda.synchronize()
        check(y, x, case.weight)
