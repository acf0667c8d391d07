"""The matrix products against float64."""

import pytest
import torch

from awq_core import gemm


@pytest.mark.parametrize("width", [1, 5, 100, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_of_several_batches(monkeypatch, width, dtype):
    monkeypatch.setattr(gemm, "_PANEL", 64)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, width, generator=generator).to(dtype) for rows in (7, 0, 33)]
    gram = torch.zeros(width, width)
    for batch in batches:
        gemm.add_gram_(gram, batch.float().T.contiguous())
    gemm.mirror_(gram)
    x = torch.cat(batches).double()
    torch.testing.assert_close(gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (33, 100), (700, 1500)])
def test_product_with_a_symmetric_matrix_is_fp32(shape):
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(shape, generator=generator), torch.randn(shape[1], shape[1], generator=generator)
    h = h + h.T
    exact = x.double() @ h.double()
    found = gemm.times_symmetric(x, h)
    assert found.dtype is torch.float32
    # bf16 or TF32 inputs would miss this bound by far.
    torch.testing.assert_close(
        found.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max() if x.numel() else 1) * 4
    )


def test_product_in_bf16_stays_in_bf16():
    h = torch.eye(16, dtype=torch.bfloat16)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(gemm.times_symmetric(x, h), x)
