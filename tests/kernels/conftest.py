"""Quantized linears made of random codes, and the matrix they stand for, worked out without the project's code."""

from dataclasses import dataclass

import pytest
import torch

from awq_core.checkpoint.pack import PackedLinear, pack_linear


@dataclass
class Case:
    """A packed linear, and its weight `[out, in]` in float64."""

    packed: PackedLinear
    weight: torch.Tensor


@pytest.fixture
def make():
    """make(in, out, group_size): codes and zero points over the whole of 0..15, extremes in the first columns."""

    def make(inputs, outputs, group_size, *, seed=0, dtype=torch.float16):
        generator = torch.Generator().manual_seed(seed)
        groups = 1 if group_size == -1 else inputs // group_size
        codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
        zeros = torch.randint(0, 16, (outputs, groups), generator=generator)
        zeros[0], zeros[1], codes[0], codes[1] = 0, 15, 15, 0
        scales = (0.02 + 0.1 * torch.rand(outputs, groups, generator=generator)).to(dtype)
        packed = pack_linear(codes.to(torch.uint8), scales.float(), zeros, dtype)
        length = inputs // groups
        weight = torch.zeros(outputs, inputs, dtype=torch.float64)
        for group in range(groups):
            part = slice(group * length, (group + 1) * length)
            weight[:, part] = (codes[:, part] - zeros[:, group, None]).double() * scales[:, group, None].double()
        return Case(packed, weight)

    return make
