"""Divergence against plain loops over probabilities, and against distributions whose divergence is known."""

import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

from awq_core.errors import ConfigError, NumericsError
from awq_core.evaluation import divergence
from awq_core.evaluation.perplexity import CHUNK


def probabilities(model, prefix):
    with torch.no_grad():
        logits = [float(x) for x in model.eval()(torch.tensor([prefix])).logits[0, -1]]
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


def top(values, count):
    return set(sorted(range(len(values)), key=lambda v: -values[v])[:count])


@pytest.fixture(scope="module")
def slow(model, other, ids):
    """KL, same top-1, shared top-5 of every position of 3 windows of 12, one prefix at a time: [3][12]."""
    rows = []
    for start in (0, 12, 24):
        row = []
        for end in range(start + 1, start + 13):
            p, q = (probabilities(m, ids[start:end]) for m in (model, other))
            kl = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            row.append((kl, top(p, 1) == top(q, 1), len(top(p, 5) & top(q, 5)) / 5))
        rows.append(row)
    return rows


def test_against_the_definition(model, other, tokenizer, text, slow):
    result = divergence(model, other, tokenizer, text, window=12)
    kl = sorted(position[0] for row in slow for position in row)
    assert result.kl_mean == pytest.approx(statistics.fmean(kl), rel=1e-5)
    assert result.kl_median == pytest.approx(statistics.median(kl), rel=1e-5)
    rank = 0.999 * (len(kl) - 1)  # linear between the two largest of 36
    assert result.kl_p999 == pytest.approx(kl[34] + (rank - 34) * (kl[35] - kl[34]), rel=1e-5)
    means = [statistics.fmean(position[0] for position in row) for row in slow]
    assert result.kl_stderr == pytest.approx(statistics.stdev(means) / math.sqrt(3), rel=1e-4)
    assert result.top1_agreement == pytest.approx(statistics.fmean(position[1] for row in slow for position in row))
    assert result.top5_agreement == pytest.approx(statistics.fmean(position[2] for row in slow for position in row))
    assert 0 < result.top5_agreement < 1  # random models share some, or this test would say nothing
    assert (result.tokens, result.windows, result.window) == (36, 3, 12)


def test_direction(model, other, tokenizer, text):
    there, back = divergence(model, other, tokenizer, text), divergence(other, model, tokenizer, text)
    assert there.kl_mean != pytest.approx(back.kl_mean, rel=1e-3)
    assert there.top1_agreement == back.top1_agreement


def test_a_model_against_itself(model, tokenizer, text):
    result = divergence(model, model, tokenizer, text, window=12)
    assert (result.kl_mean, result.kl_stderr, result.kl_p999) == (0, 0, 0)
    assert (result.top1_agreement, result.top5_agreement) == (1, 1)


def test_one_window_has_no_spread(model, other, tokenizer, text, slow):
    result = divergence(model, other, tokenizer, text, window=12, max_windows=1)
    assert result.kl_mean == pytest.approx(statistics.fmean(position[0] for position in slow[0]), rel=1e-5)
    assert math.isnan(result.kl_stderr)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["kl_stderr"] is None


class Fixed(torch.nn.Module):
    """The same logits after every token."""

    def __init__(self, logits, **config):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=torch.float32))
        self.config = SimpleNamespace(**config)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize(
    ("order", "top1", "top5"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], 1, 1.0),
        ([8, 9, 7, 6, 5, 4, 3, 2, 1, 0], 0, 1.0),  # the same five in another order
        ([9, 8, 7, 6, 4, 5, 3, 2, 1, 0], 1, 0.8),
        ([9, 1, 2, 0, 3, 4, 5, 6, 7, 8], 1, 0.2),
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 0, 0.0),
    ],
)
def test_agreement_of_known_orders(tokenizer, order, top1, top5):
    reference = Fixed([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    result = divergence(reference, Fixed(order), tokenizer, "w1 w2 w3")
    assert result.top1_agreement == top1
    assert result.top5_agreement == pytest.approx(top5)


def test_known_divergence_across_chunks(tokenizer):
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    length = CHUNK + 10
    text = "w3 " * (length - 1)
    models = [Fixed([math.log(x) for x in values]) for values in (p, q)]
    result = divergence(*models, tokenizer, text, window=length)
    assert result.kl_mean == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert result.tokens == length


def test_masked_tokens_count_for_nothing(tokenizer):
    masked = [math.log(0.5), math.log(0.5), -math.inf]
    uneven = [math.log(0.75), math.log(0.25), -math.inf]
    result = divergence(Fixed(masked), Fixed(uneven), tokenizer, "w1 w2 w3")
    assert result.kl_mean == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), rel=1e-5)


def test_the_window_fits_both_models(tokenizer):
    long, short = Fixed([1.0, 2.0], max_position_embeddings=90), Fixed([1.0, 2.0], max_position_embeddings=30)
    for pair in ((long, short), (short, long)):
        assert divergence(*pair, tokenizer, "w1 " * 200).window == 30
    assert divergence(Fixed([1.0]), Fixed([1.0]), tokenizer, "w1 " * 600).window == 512


def test_progress(model, other, tokenizer, text):
    calls = []
    divergence(model, other, tokenizer, text, window=12, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_bad_input(model, tokenizer, text):
    with pytest.raises(ConfigError, match="vocabularies differ: 40 and 3"):
        divergence(model, Fixed([1.0, 2.0, 3.0]), tokenizer, text)
    with pytest.raises(NumericsError, match="window 0 is not finite"):
        divergence(Fixed([1.0, 2.0]), Fixed([1.0, math.nan]), tokenizer, text)
    with pytest.raises(NumericsError, match="not finite"):
        divergence(Fixed([1.0, 2.0]), Fixed([1.0, -math.inf]), tokenizer, text)
