"""Folding keeps the function, also where the norm is stored in a short dtype."""

import pytest
import torch
from torch import nn

from awq_core.hooks import ScaleGroup
from awq_core.quantization.fold import apply_to_block, fold_norm, fold_rows
from awq_core.scale_groups import resolve_groups


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


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("prev_rows", ["last", "heads"])
def test_a_fused_qkv_is_divided_where_its_values_are(prev_rows, kv, generator):
    """4 query heads of 3. The values are cut out as attention does it, and nothing else may change."""
    heads, size = 4, 3
    block = nn.Module()
    block.size, block.qkv, block.out = size, nn.Linear(8, (heads + 2 * kv) * size), nn.Linear(heads * size, 5)
    group = ScaleGroup(prev="qkv", layers=("out",), prev_rows=prev_rows, head_dim="size")
    x = torch.randn(6, 8, generator=generator)

    def parts():
        """(queries and keys, what the output projection makes of the values)"""
        fused = block.qkv(x)
        if prev_rows == "heads":
            fused = fused.view(6, kv, -1, size)
            other, values = fused[:, :, :-1], fused[:, :, -1]
        else:
            fused = fused.view(6, -1, size)
            other, values = fused[:, :-kv], fused[:, -kv:]
        return other, block.out(values.repeat_interleave(heads // kv, dim=1).flatten(1))

    with torch.no_grad():
        before, weight = parts(), block.out.weight.clone()
        (plan,), _ = resolve_groups(block, [group])
        apply_to_block(block, plan, torch.exp(torch.randn(heads * size, generator=generator)))
        for got, want in zip(parts(), before, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (block.out.weight - weight).abs().max() > 0.1


def test_keys_and_values_of_one_linear_are_divided_where_the_values_are(generator):
    """4 heads, keys of 5 and values of 3 each, as in latent attention."""
    heads, key, value = 4, 5, 3
    block = nn.Module()
    block.size, block.kv, block.out = value, nn.Linear(8, heads * (key + value)), nn.Linear(heads * value, 6)
    group = ScaleGroup(prev="kv", layers=("out",), prev_rows="kv_heads", head_dim="size")
    x = torch.randn(7, 8, generator=generator)

    def parts():
        keys, values = block.kv(x).view(7, heads, key + value).split((key, value), dim=-1)
        return keys, block.out(values.flatten(1))

    with torch.no_grad():
        before, weight = parts(), block.out.weight.clone()
        (plan,), _ = resolve_groups(block, [group])
        apply_to_block(block, plan, torch.exp(torch.randn(heads * value, generator=generator)))
        for got, want in zip(parts(), before, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (block.out.weight - weight).abs().max() > 0.1


def test_the_square_of_relu_takes_the_root(generator):
    block = nn.Module()
    block.up, block.down = nn.Linear(8, 12), nn.Linear(12, 5)
    x = torch.randn(6, 8, generator=generator)

    def forward():
        return block.down(block.up(x).relu().square())

    with torch.no_grad():
        before = forward()
        scale = torch.exp(torch.randn(12, generator=generator))
        (plan,), _ = resolve_groups(block, [ScaleGroup(prev="up", layers=("down",), degree=2)])
        weights = block.up.weight.clone(), block.down.weight.clone()
        apply_to_block(block, plan, scale)
        torch.testing.assert_close(forward(), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(block.up.weight, weights[0] / scale.sqrt()[:, None])
        torch.testing.assert_close(block.down.weight, weights[1] * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_each_head_with_one_weight_for_all(dtype, generator):
    """Gated linear attention: 3 heads of 4 channels, one weight of 4. The readers' scales are the same in each head."""
    heads, size = 3, 4
    block = nn.Module()
    block.size, block.norm, block.out = (
        size,
        RMSNorm(torch.randn(size, generator=generator).to(dtype)),
        nn.Linear(12, 5),
    )
    x = torch.randn(7, heads, size, generator=generator)

    def forward():
        return block.out(block.norm(x).flatten(1))

    with torch.no_grad():
        before, weight = forward(), block.out.weight.clone()
        (plan,), _ = resolve_groups(block, [ScaleGroup(prev="norm", layers=("out",), head_dim="size")])
        apply_to_block(block, plan, torch.exp(torch.randn(heads * size, generator=generator)))
        torch.testing.assert_close(forward(), before, rtol=1e-5, atol=1e-5)
    factors = (block.out.weight / weight).view(5, heads, size)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert (factors - 1).abs().max() > 0.1
