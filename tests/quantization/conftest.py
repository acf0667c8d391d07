"""Layers and models small enough for oracles that look at every token."""

import pytest
import torch

from awq_core.calibration.statistics import Sums


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def statistics_of(x, name="x"):
    sums = Sums.zeros(x.shape[-1], x.device)
    for batch in x.split(50):
        sums.add(batch)
    return sums.finish(name)


def outlier_layer(generator, tokens=300, in_features=128, out_features=48, outliers=4, size=30.0):
    """Activations with a few channels `size` times as large as the rest, and weights to multiply them with."""
    x = torch.randn(tokens, in_features, generator=generator) + 0.1
    x[:, torch.randperm(in_features, generator=generator)[:outliers]] *= size
    return x, torch.randn(out_features, in_features, generator=generator) * 0.02
