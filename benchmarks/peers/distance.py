"""How far an engine's numbers are from ours, in the two measures of benchmarks/engines.py."""

import math

import torch

LIMIT = 1e-2


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """The two measures, of logits or log-probabilities [sequences, tokens, vocabulary].

    Raises:
        ValueError: their shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"logits {list(theirs.shape)}, ours {list(ours.shape)}")
    ours, apart = ours.double(), (theirs.double() - ours.double())
    return {"largest": float(apart.abs().max() / ours.abs().max()), "rms": float(apart.norm() / ours.norm())}


def same(found: dict[str, float], limit: float = LIMIT) -> bool:
    """Within the limit; what is not a number is not."""
    return all(map(math.isfinite, found.values())) and found["largest"] <= limit
