"""Two measurements on the same windows of text, and whether they differ.

A window that is hard is hard for both models, so the spread between windows says little about which model is better.
Their difference window by window does not have that spread in it. With a_w and b_w the two values in window w of n,

    difference = mean_w (a_w - b_w)        standard error = std_w(a_w - b_w) / √n

which is often many times smaller than the standard errors of the means of a and of b.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from awq_core.errors import ConfigError

# A difference of fewer standard errors than this may be chance.
STANDARD_ERRORS = 2.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over windows.

    Attributes:
        mean: in the unit of the values.
        stderr: standard error of the mean; NaN with one window.
    """

    mean: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One quantity of A and of B on the same windows, and A minus B."""

    a: Estimate
    b: Estimate
    difference: Estimate

    @property
    def apart(self) -> bool:
        """Whether A and B can be told apart: never with one window, which has no standard error."""
        gap, error = abs(self.difference.mean), self.difference.stderr
        return gap > 0 and gap >= STANDARD_ERRORS * error

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN stays NaN."""
        return {**asdict(self), "apart": self.apart}


def estimate(values: torch.Tensor) -> Estimate:
    """Mean and standard error of `[windows]` values."""
    values = values.double()
    count = len(values)
    error = float(values.std()) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(float(values.mean()), error)


def paired(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """A and B, each `[windows]`, the same windows in the same order.

    Raises:
        ConfigError: their numbers of windows differ, or are 0.
    """
    if a.shape != b.shape or a.dim() != 1 or not len(a):
        raise ConfigError(
            f"values of shape {tuple(a.shape)} and {tuple(b.shape)} are no pairs", hint="one value a window, of both"
        )
    return Pair(estimate(a), estimate(b), estimate(a.double() - b.double()))


def perplexities(nll: torch.Tensor) -> torch.Tensor:
    """Values whose mean is the perplexity and whose spread is its own, to first order.

    Perplexity is the exponential of a mean, no mean itself. With m the mean of the `[windows]` losses (nats a token)

        v_w = exp(m) · (1 + nll_w - m)        mean_w v_w = exp(m), std_w v_w = exp(m) · std_w nll_w

    so that `estimate` and `paired` of these are right for perplexities too.
    """
    nll = nll.double()
    mean = nll.mean()
    return mean.exp() * (1 + nll - mean)
