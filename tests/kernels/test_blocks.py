"""The operations of a decoder block in plain torch: what transformers computes, bit for bit, and sums in float64."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from awq_core.kernels import blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = ("test_schema", "test_faketensor")


def random(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("theirs", "offset"), [(LlamaRMSNorm, 0.0), (Gemma2RMSNorm, 1.0)])
def test_the_norm_is_transformers(theirs, offset, dtype):
    module = theirs(48, eps=1e-5).to(dtype)
    module.weight.data = random(48, dtype=dtype)
    x, residual = random(2, 3, 48, seed=2, dtype=dtype), random(2, 3, 48, seed=3, dtype=dtype)
    with torch.no_grad():
        normed, total = blocks.rms_norm(x, module.weight, 1e-5, residual=residual, offset=offset)
        assert torch.equal(total, residual + x) and torch.equal(normed, module(residual + x))
        normed, same = blocks.rms_norm(x, module.weight, 1e-5, offset=offset)
        assert same is x and torch.equal(normed, module(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("turning", "rows"), [(16, 2), (16, 1), (6, 2)])
def test_rotary_is_transformers(turning, rows, dtype):
    q, k, v = random(2, 4, 3, 16, dtype=dtype), *(random(2, 2, 3, 16, seed=n, dtype=dtype) for n in (2, 3))
    cos, sin = random(rows, 3, turning, seed=4, dtype=dtype), random(rows, 3, turning, seed=5, dtype=dtype)
    cache_k, cache_v = torch.zeros(2, 2, 8, 16, dtype=dtype), torch.zeros(2, 2, 8, 16, dtype=dtype)
    got = blocks.rotate_and_store(q, k, v, cos, sin, cache_k, cache_v, torch.tensor([6, 1, 2]))
    turned_q, turned_k = apply_rotary_pos_emb(q[..., :turning], k[..., :turning], cos, sin)
    assert torch.equal(got, torch.cat([turned_q, q[..., turning:]], -1))
    assert torch.equal(cache_k[:, :, [6, 1, 2]], torch.cat([turned_k, k[..., turning:]], -1))
    assert torch.equal(cache_v[:, :, [6, 1, 2]], v)
    assert not cache_k[:, :, [0, 3, 4, 5, 7]].any() and not cache_v[:, :, [0, 3, 4, 5, 7]].any()


def exact(q, k, v, mask, scale, softcap):
    """In float64, with the key-value heads repeated."""
    k, v = (one.double().repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0) @ v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["none", "bool", "added", "shared"])
def test_attention(kind, softcap, dtype):
    q, k, v = random(3, 6, 1, 16, dtype=dtype), *(random(3, 2, 21, 16, seed=n, dtype=dtype) for n in (2, 3))
    taking = random(1 if kind == "shared" else 3, 1, 1, 21, seed=4) > -0.5
    if kind != "shared":
        taking[1] = False  # nothing is left of one row
    mask = {"none": None, "added": torch.where(taking, 0.5, -torch.inf)}.get(kind, taking)
    got = blocks.decode_attention(q, k, v, mask, 0.7, softcap)
    assert got.dtype == dtype and got.shape == q.shape
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(got.double(), exact(q, k, v, mask, 0.7, softcap), rtol=unit, atol=4 * unit)


def test_torch_finds_nothing_wrong_with_the_operators():
    x, weight = random(2, 3, 16), random(16)
    q, k, angles = random(2, 4, 1, 16), random(2, 2, 1, 16), random(2, 1, 16)
    cache = random(2, 2, 5, 16)
    calls = {
        torch.ops.awq.rms_norm.default: (x.transpose(0, 1), weight, 1e-5, 0.0),
        torch.ops.awq.add_rms_norm.default: (x, x.clone(), weight, 1e-5, 1.0),
        torch.ops.awq.rotate_and_store.default: (
            *(q, k, k.clone(), angles, angles.clone()),
            *(cache, cache.clone(), torch.tensor([3])),
        ),
        torch.ops.awq.decode_attention.default: (q, cache, cache.clone(), torch.ones(2, 1, 1, 5) > 0, 0.2, 0.0),
    }
    for operator, arguments in calls.items():
        found = torch.library.opcheck(operator, arguments, test_utils=OPTIONS)
        assert set(found.values()) == {"SUCCESS"}, operator


def test_a_gradient_is_an_error():
    x = random(2, 16).requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        blocks.rms_norm(x, random(16), 1e-5)[0].sum().backward()


def test_triton_takes_what_its_backend_would(monkeypatch):
    """Never by itself while the backend is below the reference; never on a CPU outside the interpreter."""
    monkeypatch.delenv("AWQ_KERNEL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu = torch.empty(1, dtype=torch.float16, device="meta")
    monkeypatch.setattr(blocks, "PRIORITY", {"triton": 1, "reference": 0})
    assert not blocks.on_triton(torch.empty(1, dtype=torch.float16)) and not blocks.on_triton(gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert blocks.on_triton(gpu) and not blocks.on_triton(gpu.float())
    monkeypatch.setattr(blocks, "PRIORITY", {"triton": -1, "reference": 0})
    assert not blocks.on_triton(gpu)
    monkeypatch.setenv("AWQ_KERNEL", "triton")
    assert blocks.on_triton(gpu)
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    assert not blocks.on_triton(gpu)
