"""The sliding window against a loop over tokens: each from the prefix its window gives it, in float64."""

import math

import pytest
import torch

from awq_core.errors import ConfigError, NumericsError
from awq_core.evaluation import sliding_perplexity


def nll_of(model, prefix, token):
    with torch.no_grad():
        logits = [float(x) for x in model.eval()(torch.tensor([prefix])).logits[0, -1]]
    top = max(logits)
    return math.log(math.fsum(math.exp(x - top) for x in logits)) - (logits[token] - top)


def slow(model, ids, window, stride):
    """Token t is scored by the first window that reaches it; windows begin at 0, S, 2S, ..."""
    losses = []
    for t in range(1, len(ids)):
        start = next(s for s in range(0, len(ids), stride) if s + window > t)
        losses.append(nll_of(model, ids[start:t], ids[t]))
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize(("window", "stride"), [(12, 5), (12, 11), (12, 1), (9, 4), (37, 8), (50, 20), (2, 1)])
def test_against_the_definition(model, tokenizer, text, ids, window, stride):
    result = sliding_perplexity(model, tokenizer, text, window=window, stride=stride)
    expected = slow(model, ids, window, stride)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == len(ids) - 1
    assert f"stride {stride}" in result.protocol and not result.protocol.startswith("the first")


def test_the_first_windows(model, tokenizer, text, ids):
    result = sliding_perplexity(model, tokenizer, text, window=12, stride=5, max_windows=2)
    assert result.nll == pytest.approx(slow(model, ids[:17], 12, 5), rel=1e-5)
    assert (result.tokens, result.windows) == (16, 2) and result.protocol.startswith("the first 2 sliding windows")


@pytest.mark.parametrize("options", [{"window": 12, "stride": 12}, {"window": 1}, {"stride": 0}, {"max_windows": 0}])
def test_bad_settings(model, tokenizer, text, options):
    with pytest.raises(ConfigError):
        sliding_perplexity(model, tokenizer, text, **options)


def test_nan_is_refused(model, tokenizer, text):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **kwargs):
            output = self.inner(**kwargs)
            output.logits = output.logits * math.nan
            return output

    with pytest.raises(NumericsError):
        sliding_perplexity(Broken(), tokenizer, text, window=8, stride=4)
