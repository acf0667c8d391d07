"""Folding keeps the function, also where the norm is stored in a short dtype."""

import pytest
import torch
from torch import nn

from awq_core.quantization.fold import fold_norm, fold_rows


class RMSNorm(nn.Module):
    """x / rms(x) · (offset + w)."""

    def __init__(self, weight, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.offset = offset

    def forward(self, x):
        scale = self.offset + self.weight.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_effective_scale_undoes_the_rounding(generator, dtype, offset):
    norm = RMSNorm((torch.randn(64, generator=generator) * 0.3 + 1 - offset).to(dtype), offset)
    x, weight = torch.randn(9, 64, generator=generator), torch.randn(5, 64, generator=generator)
    before = norm(x) @ weight.T
    scale = torch.exp(torch.randn(64, generator=generator))
    effective = fold_norm(norm, scale, offset)
    torch.testing.assert_close(norm(x) @ (weight * effective).T, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(effective, scale, rtol=0.1, atol=0.02)
    if dtype is torch.bfloat16:
        # The scale that was asked for would have moved the output by far more.
        assert (norm(x) @ (weight * scale).T - before).abs().max() > 1e-3


def test_norm_bias_and_zero_weights(generator):
    norm = nn.LayerNorm(16)
    norm.weight.data = torch.randn(16, generator=generator)
    norm.weight.data[3] = 0
    norm.bias.data = torch.randn(16, generator=generator)
    x, weight = torch.randn(7, 16, generator=generator), torch.randn(4, 16, generator=generator)
    before = norm(x) @ weight.T
    effective = fold_norm(norm, torch.exp(torch.randn(16, generator=generator)), 0.0)
    torch.testing.assert_close(norm(x) @ (weight * effective).T, before, rtol=1e-5, atol=1e-5)


def test_only_the_last_rows_of_a_fused_linear_are_divided():
    bias = nn.Parameter(torch.ones(6), requires_grad=False)
    divisor = fold_rows(bias, 6, torch.tensor([2.0, 4.0]))
    assert divisor.tolist() == [1, 1, 1, 1, 2, 4]
    assert bias.tolist() == [1, 1, 1, 1, 0.5, 0.25]
