"""The clip search against brute force over every row, group and pair, on tokens."""

import itertools

import pytest
import torch

from awq_core.quantization import clip

from .conftest import outlier_layer, statistics_of

DTYPE = torch.float16


def token_loss(values, inputs, low, high):
    """Error of the partial outputs over all tokens, one range for one row and group."""
    step = ((high - low) / 15).clamp(min=2.0**-20).to(DTYPE).float()
    zero = (-low / step).round().clamp(0, 15)
    quantized = ((values / step).round() + zero).clamp(0, 15).sub(zero) * step
    return float((inputs @ (quantized - values)).square().mean())


def token_clip(values, inputs):
    """(loss unclipped, best loss) over every pair of factors that are 0.2 apart at most."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    pairs = [(a, b) for a, b in itertools.product(range(20, 13, -1), repeat=2) if abs(a - b) <= 4]
    losses = [token_loss(values, inputs, low * a / 20, high * b / 20) for a, b in pairs]
    return losses[0], min(losses)


@pytest.mark.parametrize("screening", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64])
def test_search_agrees_with_brute_force_on_tokens(generator, monkeypatch, group_size, screening):
    monkeypatch.setattr(clip, "screening_dtype", lambda device: screening)
    x, weight = outlier_layer(generator, in_features=64, out_features=6)
    weight = weight * torch.exp(torch.randn(weight.shape, generator=generator))  # heavy tails, so that clipping pays
    lo, hi = clip.search(weight, statistics_of(x).gram, group_size, DTYPE)
    clipped = 0
    for row, group in itertools.product(range(weight.shape[0]), range(64 // group_size)):
        columns = slice(group * group_size, (group + 1) * group_size)
        unclipped, best = token_clip(weight[row, columns], x[:, columns])
        found = token_loss(weight[row, columns], x[:, columns], lo[row, group], hi[row, group])
        assert found <= best * (1 + (1e-3 if screening is torch.float32 else 0.05))
        clipped += best < unclipped
    assert clipped > 0


def test_range_always_includes_zero(generator):
    weight = torch.randn(16, 64, generator=generator).abs() + 0.5
    lo, hi = clip.search(weight, torch.eye(64), 32, DTYPE)
    assert (lo <= 0).all() and (hi >= 0).all()
    assert (lo == 0).all()


def test_chunks_of_rows_do_not_change_the_result(generator, monkeypatch):
    x, weight = outlier_layer(generator)
    whole = clip.search(weight, statistics_of(x).gram, 32, DTYPE)
    monkeypatch.setattr(clip, "CHUNK_ELEMENTS", 128 * 5)
    pieces = clip.search(weight, statistics_of(x).gram, 32, DTYPE)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b)
