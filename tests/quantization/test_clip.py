"""The clip search against brute force over every row, group and pair, on tokens."""

import pytest
import torch

from awq_core.quantization import clip
from awq_core.quantization.rounding import full_range, grouped

from .conftest import outlier_layer, statistics_of

DTYPE = torch.float16


def token_clip(x, weight, group_size):
    """For each row and group, the pair whose partial outputs over all tokens err least."""
    best = {}
    for row in range(weight.shape[0]):
        for group in range(weight.shape[1] // group_size):
            columns = slice(group * group_size, (group + 1) * group_size)
            values, inputs = weight[row, columns], x[:, columns]
            low, high = values.min().clamp(max=0), values.max().clamp(min=0)
            losses = []
            for f_low, f_high in clip.PAIRS:
                step = ((high * f_high - low * f_low) / 15).clamp(min=2.0**-20).to(DTYPE).float()
                zero = (-low * f_low / step).round().clamp(0, 15)
                quantized = ((values / step).round() + zero).clamp(0, 15).sub(zero) * step
                losses.append(float((inputs @ (quantized - values)).square().mean()))
            best[row, group] = losses
    return best


@pytest.mark.parametrize("group_size", [32, 64])
def test_search_agrees_with_brute_force_on_tokens(generator, group_size):
    x, weight = outlier_layer(generator, in_features=64, out_features=6)
    weight = weight * torch.exp(torch.randn(weight.shape, generator=generator))  # heavy tails, so that clipping pays
    lo, hi = clip.search(weight, statistics_of(x).gram, group_size, DTYPE)
    full_lo, full_hi = full_range(grouped(weight, group_size))
    pairs = torch.tensor(clip.PAIRS)
    clipped = 0
    for (row, group), losses in token_clip(x, weight, group_size).items():
        ends = torch.stack([full_lo[row, group] * pairs[:, 0], full_hi[row, group] * pairs[:, 1]])
        found = (ends - torch.stack([lo[row, group], hi[row, group]])[:, None]).abs().sum(0).argmin()
        assert losses[int(found)] <= min(losses) * (1 + 1e-3)
        clipped += losses[int(found)] < losses[0]
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
