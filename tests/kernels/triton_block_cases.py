"""The Triton kernels of a decoder block against sums in float64. `test_triton.py` runs this file."""

import pytest
import torch

from awq_core.kernels import blocks
from awq_core.kernels.triton.attention import decode_attention, split_for
from awq_core.kernels.triton.matmul import INTERPRETED, _counters, _stream
from awq_core.kernels.triton.norm import rms_norm, warps_for
from awq_core.kernels.triton.rotary import rotate_and_store

DEVICE = torch.device("cpu" if INTERPRETED else "cuda:0")
DTYPES = (torch.float16, torch.bfloat16)
ULP = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random(*shape, seed=1, dtype=torch.float16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every `torch.empty` is full of NaN, and the operators take Triton's path."""
    monkeypatch.setenv("AWQ_KERNEL", "triton")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# -- norm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (2, 5, 1000), (0, 64), (7,), (1, 1, 4097)])
def test_the_norm(shape, offset, dtype):
    x, residual = random(*shape, dtype=dtype), random(*shape, seed=2, dtype=dtype)
    weight = random(shape[-1], seed=3, dtype=dtype)
    for added in (None, residual):
        normed, total = blocks.rms_norm(x, weight, 1e-5, residual=added, offset=offset)
        assert normed.dtype == total.dtype == dtype and normed.shape == total.shape == x.shape
        assert torch.equal(total, x if added is None else x + residual), "as torch rounds the sum"
        wide = total.double()
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        want = wide * (offset + weight.double())
        torch.testing.assert_close(normed.double(), want, rtol=1.1 * ULP[dtype], atol=1e-6)
        same, _ = blocks.plain_rms_norm(x, added, weight, 1e-5, offset)
        # A last digit of fp32 may decide which way a 16-bit value is rounded: seldom, and by one unit.
        assert same.numel() < 200 or (same != normed).double().mean() < 0.02
        torch.testing.assert_close(normed, same, rtol=2.1 * ULP[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-6, 3e4])
def test_the_norm_of_extremes(size, dtype):
    """Squares of fp16's largest numbers are no fp16; a row of zeros has no length."""
    x, weight = torch.full((2, 96), size, dtype=dtype, device=DEVICE), torch.ones(96, dtype=dtype, device=DEVICE)
    normed, _ = rms_norm(x, None, weight, 1e-6, 0.0)
    wide = x.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(normed.double(), want, rtol=1.1 * ULP[dtype], atol=1e-7)


def test_the_norm_of_a_slice_and_of_rows_that_do_not_fit():
    x, weight = random(4, 128), random(64)
    normed, _ = rms_norm(x[:, ::2], None, weight, 1e-6, 0.0)
    torch.testing.assert_close(normed, blocks.plain_rms_norm(x[:, ::2], None, weight, 1e-6, 0.0)[0])
    for wrong in (random(63), random(1, 64)):
        with pytest.raises(ValueError, match="with a weight"):
            rms_norm(x[:, ::2], None, wrong, 1e-6, 0.0)
    with pytest.raises(ValueError, match="residual"):
        rms_norm(x, x[:2], random(128), 1e-6, 0.0)
    with pytest.raises(ValueError, match="rows of 32768"):
        rms_norm(random(1, 40000), None, random(40000), 1e-6, 0.0)
    assert [warps_for(width) for width in (64, 512, 4096, 32768)] == [1, 1, 8, 16]


def test_rounding_to_bf16_by_hand_is_torchs():
    """Through the norm's sum, which is exact in fp32: ties, overflow, small numbers, infinities, NaN."""
    x = torch.tensor([1.0, 1.0, -1.0, 3.3e38, 2.0**-120, float("inf"), float("nan"), 0.0], dtype=torch.bfloat16)
    r = torch.tensor([2**-8, 3 * 2**-8, -(2**-8), 1e36, 2.0**-120, 1.0, 1.0, -0.0], dtype=torch.bfloat16)
    x, r = x[None].to(DEVICE), r[None].to(DEVICE)
    _, total = rms_norm(x, r, torch.ones(8, dtype=torch.bfloat16, device=DEVICE), 1e-6, 0.0)
    torch.testing.assert_close(total, x + r, rtol=0, atol=0, equal_nan=True)


# -- rotary -----------------------------------------------------------------------------------------------------------


def turned(x, cos, sin):
    """Pair by pair, in float64, as a rotation of the plane."""
    x, cos, sin = x.double(), cos.double().expand(len(x), -1, -1), sin.double().expand(len(x), -1, -1)
    y, half = x.clone(), cos.shape[-1] // 2
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        y[..., i] = a * cos[:, None, :, i] - b * sin[:, None, :, i]
        y[..., i + half] = b * cos[:, None, :, i + half] + a * sin[:, None, :, i + half]
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "pairs", "tokens", "width", "turning", "cells"),
    [
        (1, 4, 4, 1, 64, 64, [5]),
        (2, 12, 3, 1, 128, 128, [0]),
        (2, 9, 1, 3, 80, 32, [6, 0, 3]),  # partial, a width that is no power of two, any order of cells
        (1, 2, 2, 4, 24, 6, [4, 5, 6, 7]),
        (3, 10, 10, 2, 8, 2, [1, 2]),
        (1, 4, 2, 0, 16, 16, []),
    ],
)
def test_rotary(batch, heads, pairs, tokens, width, turning, cells, dtype):
    q = random(batch, heads, tokens, width, dtype=dtype)
    k, v = (random(batch, pairs, tokens, width, seed=seed, dtype=dtype) for seed in (2, 3))
    for rows in {1, batch}:
        cos, sin = (random(rows, tokens, turning, seed=seed, dtype=dtype) for seed in (4, 5))
        caches = [random(batch, pairs, 8, width, seed=seed, dtype=dtype) for seed in (6, 7)]
        want_k, want_v = (cache.double() for cache in caches)
        positions = torch.tensor(cells, dtype=torch.int64, device=DEVICE)
        got = blocks.rotate_and_store(q, k, v, cos, sin, *caches, positions)
        assert got.dtype == dtype and got.is_contiguous()
        want_k[:, :, positions], want_v[:, :, positions] = turned(k, cos, sin), v.double()
        for one, want in ((got, turned(q, cos, sin)), (caches[0], want_k)):
            torch.testing.assert_close(one.double(), want, rtol=0.51 * ULP[dtype], atol=2e-6)
        assert torch.equal(caches[1].double(), want_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_reads_slices_of_one_product_and_writes_into_a_part_of_a_cache(dtype):
    """q, k and v as views of what one matrix product made; NaN lies around all that may be touched."""
    product = random(2, 3, (4 + 2 + 2) * 16, dtype=dtype).view(2, 3, 8, 16).transpose(1, 2)
    q, k, v = product.split([4, 2, 2], dim=1)
    cos, sin = random(2, 3, 16, seed=2, dtype=dtype), random(2, 3, 16, seed=3, dtype=dtype)
    stores = [torch.full((2, 10, 2, 32), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
    caches = [store[:, 1:9, :, :16].transpose(1, 2) for store in stores]
    positions = torch.arange(6, device=DEVICE)[::2]
    got = rotate_and_store(q, k, v, cos, sin, *caches, positions)
    torch.testing.assert_close(got.double(), turned(q, cos, sin), rtol=0.51 * ULP[dtype], atol=2e-6)
    torch.testing.assert_close(caches[0][:, :, ::2][:, :, :3].double(), turned(k, cos, sin), rtol=ULP[dtype], atol=2e-6)
    assert torch.equal(caches[1][:, :, ::2][:, :, :3], v)
    for store in stores:
        assert int((~store.isnan()).sum()) == 2 * 3 * 2 * 16


def test_rotary_writes_nothing_beyond_the_cache():
    store = torch.full((1, 2, 8, 16), float("nan"), dtype=torch.float16, device=DEVICE)
    q, angles = random(1, 2, 3, 16, dtype=torch.float16), random(1, 3, 16)
    cache = store[:, :, 2:5]
    rotate_and_store(q, q, q, angles, angles, cache, cache.clone(), torch.tensor([-1, 3, 2], device=DEVICE))
    torch.testing.assert_close(
        cache[:, :, 2].double(), turned(q, angles, angles)[:, :, 2], rtol=0.51 * 2**-10, atol=2e-6
    )
    assert int((~store.isnan()).sum()) == 2 * 16


def test_rotary_that_does_not_fit_is_an_error():
    def call(q=(1, 4, 2, 16), k=(1, 2, 2, 16), cos=(1, 2, 16), cache=(1, 2, 8, 16), cells=2, dtype=torch.float16):
        angles, store = random(*cos), random(*cache, dtype=dtype)
        positions = torch.arange(cells, device=DEVICE)
        return rotate_and_store(random(*q), random(*k), random(*k), angles, angles, store, store.clone(), positions)

    assert call().shape == (1, 4, 2, 16)
    for wrong in ({"k": (1, 2, 3, 16)}, {"k": (1, 2, 2, 8)}, {"cells": 3}):
        with pytest.raises(ValueError, match="positions"):
            call(**wrong)
    for wrong in ((2, 2, 16), (1, 2, 18), (1, 2, 7), (1, 1, 16)):
        with pytest.raises(ValueError, match="cos"):
            call(cos=wrong)
    for wrong in ({"cache": (1, 3, 8, 16)}, {"cache": (1, 2, 8, 8)}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="a cache"):
            call(**wrong)


# -- attention --------------------------------------------------------------------------------------------------------


def attention(q, k, v, mask, scale, softcap=0.0):
    """Head by head in float64; zeros where no cell takes part."""
    q, k, v = q.double(), k.double(), v.double()
    y = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            pair = h * k.shape[1] // q.shape[1]
            scores = k[b, pair] @ q[b, h, 0] * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                row = mask[b if len(mask) > 1 else 0, 0, 0]
                scores = scores.masked_fill(~row, -torch.inf) if row.dtype is torch.bool else scores + row.double()
            if len(scores) and scores.max() > -torch.inf:
                y[b, h, 0] = scores.softmax(0) @ v[b, pair]
    return y


def agrees(got, q, k, v, mask, scale, softcap=0.0):
    want = attention(q, k, v, mask, scale, softcap)
    most = float(v.abs().max()) if v.numel() else 0.0
    # Weights meet the values in the dtype of these: half a unit for each weight, half for the result.
    unit = ULP[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=0.55 * unit, atol=0.55 * unit * most + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "pairs", "length", "width", "split"),
    [
        (1, 4, 4, 1, 64, 1),
        (2, 4, 2, 7, 64, 1),
        (1, 8, 2, 200, 128, 2),
        (2, 6, 2, 333, 80, 3),  # a split that does not divide the steps, a width that is no power of two
        (1, 40, 1, 150, 16, 2),  # more query heads for one pair than a program takes
        (1, 2, 1, 90, 256, 2),
        (1, 2, 2, 40, 8, 4),  # parts that have nothing to do
        (1, 2, 2, 0, 32, 1),
        (0, 2, 2, 5, 32, 1),
    ],
)
def test_attention(batch, heads, pairs, length, width, split, dtype):
    q = random(batch, heads, 1, width, dtype=dtype)
    k, v = (random(batch, pairs, length, width, seed=seed, dtype=dtype) for seed in (2, 3))
    got = decode_attention(q, k, v, None, width**-0.5, 0.0, split=split)
    assert got.dtype == dtype and got.shape == q.shape
    agrees(got, q, k, v, None, width**-0.5)
    assert torch.equal(decode_attention(q, k, v, None, width**-0.5, 0.0, split=split), got), "two runs"
    assert not _counters(DEVICE, _stream(DEVICE)).any(), "a counter was left standing"


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "-inf", "least"])
@pytest.mark.parametrize("rows", [1, 3])
def test_masks(rows, kind, dtype, split):
    """Padding on the left, and a row of which nothing is left."""
    q = random(3, 4, 1, 32, dtype=dtype)
    k, v = (random(3, 2, 300, 32, seed=seed, dtype=dtype) for seed in (2, 3))
    taking = torch.rand(rows, 1, 1, 300, generator=torch.Generator().manual_seed(4)) < 0.7
    taking[0, ..., :140] = False
    if rows == 3:
        taking[1] = False
    taking = taking.to(DEVICE)
    least = -torch.inf if kind == "-inf" else torch.finfo(dtype).min
    mask = taking if kind == "bool" else torch.where(taking, 0.0, least).to(dtype)
    got = decode_attention(q, k, v, mask, 0.2, 0.0, split=split)
    agrees(got, q, k, v, mask, 0.2)
    if rows == 3 and kind != "least":
        assert not got[1].any()


def test_a_mask_is_any_view_and_adds():
    q, k, v = random(2, 4, 1, 32), random(2, 2, 50, 32, seed=2), random(2, 2, 50, 32, seed=3)
    bias = random(2, 1, 1, 100, seed=4, dtype=torch.float32)[..., ::2]
    agrees(blocks.decode_attention(q, k, v, bias, 0.2), q, k, v, bias, 0.2)
    agrees(blocks.decode_attention(q, k, v, bias[:1].expand(2, -1, -1, -1) > 0, 0.2), q, k, v, bias[:1] > 0, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [1, 2])
def test_scores_are_capped(dtype, split):
    q, k, v = (
        random(1, 4, 1, 64, dtype=dtype) * 8,
        random(1, 2, 150, 64, dtype=dtype),
        random(1, 2, 150, 64, dtype=dtype),
    )
    taking = (torch.arange(150, device=DEVICE) > 30)[None, None, None]
    for cap in (1.0, 50.0):
        got = decode_attention(q, k, v, taking, 0.5, cap, split=split)
        agrees(got, q, k, v, taking, 0.5, cap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(dtype):
    """Far beyond where exp overflows, of both signs; and all the same."""
    k, v = random(1, 1, 70, 16, seed=2, dtype=dtype), random(1, 1, 70, 16, seed=3, dtype=dtype)
    for size in (0.0, 1.0, 300.0):
        q = random(1, 2, 1, 16, dtype=dtype) * size
        for split in (1, 2):
            agrees(decode_attention(q, k, v, None, 10.0, 0.0, split=split), q, k, v, None, 10.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_that_are_masked_out_are_not_read(dtype):
    """A cache of `torch.empty` beyond what was written, in a slice of something wider."""
    store = torch.full((2, 2, 2, 400, 48), float("nan"), dtype=dtype, device=DEVICE)
    k, v = store[..., :32].unbind(0)
    k[:, :, :130], v[:, :, :130] = random(2, 2, 130, 32, dtype=dtype), random(2, 2, 130, 32, seed=2, dtype=dtype)
    taking = (torch.arange(400, device=DEVICE) < 130)[None, None, None]
    q = random(2, 4, 1, 32, seed=3, dtype=dtype)
    got = decode_attention(q, k, v, taking, 0.2, 0.0, split=2)
    agrees(got, q, k[:, :, :130], v[:, :, :130], None, 0.2)


def test_attention_that_does_not_fit_is_an_error():
    q, k = random(1, 4, 1, 16), random(1, 2, 8, 16)
    for wrong in (random(1, 4, 2, 16), random(1, 3, 1, 16), random(1, 4, 1, 8), q.bfloat16(), random(2, 4, 1, 16)):
        with pytest.raises(ValueError, match="one token"):
            decode_attention(wrong, k, k, None, 1.0, 0.0)
    for wrong in (random(1, 4, 1, 8), random(1, 1, 1, 7), random(2, 1, 1, 8), random(8)):
        with pytest.raises(ValueError, match="a mask"):
            decode_attention(q, k, k, wrong, 1.0, 0.0)
    with pytest.raises(ValueError, match="more than 2048"):
        decode_attention(
            random(1, 2500, 1, 16), random(1, 2500, 8, 16), random(1, 2500, 8, 16), None, 1.0, 0.0, split=2
        )


@pytest.mark.parametrize("steps", [0, 1, 3, 8, 500])
@pytest.mark.parametrize("programs", [1, 8, 300, 5000])
def test_a_split_fills_the_gpu_and_leaves_each_part_two_steps(programs, steps):
    split = split_for(programs, steps, 100)
    assert split == 1 or (steps >= 2 * split and programs * split // 2 < 200 and split <= 64)
    assert programs * split >= 200 or steps < 4 * split or split == 64


# -- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_implementations_do_the_same(dtype, monkeypatch):
    """The rest of a decoder block on Triton and in plain torch, behind the operators, compiled and not."""
    x, residual = random(2, 1, 64, dtype=dtype), random(2, 1, 64, seed=2, dtype=dtype)
    weight, angles = random(64, seed=3, dtype=dtype), random(2, 1, 16, seed=4, dtype=dtype)
    k, v = random(2, 2, 1, 16, seed=5, dtype=dtype), random(2, 2, 1, 16, seed=6, dtype=dtype)
    taking = (torch.arange(9, device=DEVICE) < 6).expand(2, 1, 1, 9)

    def block(x, residual, k, v, cache_k, cache_v, positions):
        normed, total = blocks.rms_norm(x, weight, 1e-5, residual=residual)
        q = normed.view(2, 1, 4, 16).transpose(1, 2)
        q = blocks.rotate_and_store(q, k, v, angles, angles, cache_k, cache_v, positions)
        y = blocks.decode_attention(q, cache_k, cache_v, taking, 0.25)
        return blocks.rms_norm(y.transpose(1, 2).reshape(2, 1, 64), weight, 1e-5)[0] + total

    def run(function):
        caches = [random(2, 2, 9, 16, seed=seed, dtype=dtype) for seed in (7, 8)]
        return [function(x, residual, k, v, *caches, torch.tensor([5], device=DEVICE)), *caches]

    found = {}
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        for name in ("triton", "reference"):
            monkeypatch.setenv("AWQ_KERNEL", name)
            torch.compiler.reset()
            found[name] = run(block)
            compiled = run(torch.compile(block, fullgraph=True, backend="aot_eager"))
            assert all(torch.equal(a, b) for a, b in zip(compiled, found[name], strict=True))
    for a, b in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=4 * ULP[dtype], atol=4 * ULP[dtype])


def test_32_bits_are_plain_torchs(monkeypatch):
    x = random(2, 64, dtype=torch.float32)
    assert blocks.on_triton(x.half()) and not blocks.on_triton(x)
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    assert not blocks.on_triton(x.half())
    monkeypatch.delenv("AWQ_KERNEL")
    assert not blocks.on_triton(x.half()), "the backend is chosen by name alone"


@pytest.mark.skipif(INTERPRETED, reason="a graph is of a GPU")
def test_a_captured_graph_replays():
    q, k, v = random(1, 4, 1, 64), random(1, 1, 900, 64, seed=2), random(1, 1, 900, 64, seed=3)
    decode_attention(q, k, v, None, 0.1, 0.0, split=4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(q, k, v, None, 0.1, 0.0, split=4)
    for seed in (7, 8):
        q.copy_(random(1, 4, 1, 64, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        agrees(y, q, k, v, None, 0.1)
