"""Layers whose inputs are correlated, so that errors can make up for one another, and losses in fp64."""

import torch

from awq_core.quantization.rounding import decode, full_range, grouped, make_grid


def correlated_layer(generator, tokens=600, in_features=64, out_features=9, rank=6, noise=0.5):
    """Inputs that are mostly a mixture of `rank` sources, with a mean; heavy-tailed weights."""
    mixing = torch.randn(rank, in_features, generator=generator)
    x = torch.randn(tokens, rank, generator=generator) @ mixing + noise * torch.randn(
        tokens, in_features, generator=generator
    )
    x = x * torch.exp(0.5 * torch.randn(in_features, generator=generator)) + torch.randn(
        in_features, generator=generator
    )
    weight = torch.randn(out_features, in_features, generator=generator)
    return x, weight * torch.exp(0.5 * torch.randn(weight.shape, generator=generator)) * 0.02


def grid_of(weight, group_size, dtype=torch.float16, shrink=0.9):
    """Steps that differ from group to group; a little narrower than the range, so that some weights saturate."""
    lo, hi = full_range(grouped(weight, group_size))
    return make_grid(lo * shrink, hi * shrink, dtype)


def losses(weight, codes, grid, gram):
    """δ H δᵀ of each row in fp64, `[out]`."""
    error = (decode(codes, grid).flatten(-2) - weight).double()
    return ((error @ gram.double()) * error).sum(-1)


def assert_codes(codes, shape):
    assert codes.shape == shape and torch.equal(codes, codes.round())
    assert codes.min() >= 0 and codes.max() <= 15
