"""Statistics of a block: every token counts once, and nothing is run that nobody observes."""

import pytest
import torch
from torch import nn

from awq_core.calibration.trace import record
from awq_core.plan_types import BlockPlan, LinearPlan
from awq_core.quantization.collect import collect
from awq_core.scale_groups import GroupPlan

WIDTH = 8


class Block(nn.Module):
    """up -> down, and `side`, which is called as often as the input's first number says."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down, self.side = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.ran = 0

    def forward(self, hidden):
        normed = self.norm(hidden)
        for _ in range(int(hidden.flatten()[0])):
            normed = normed + self.side(normed)
        out = self.down(self.up(normed))
        self.ran += 1
        return out


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, use_cache=False):
        return self.block(x)


def statistics(batches, names=("up", "down")):
    torch.manual_seed(0)
    model = Model()
    inputs = record(model, [model.block], [{"x": batch} for batch in batches])
    linears = tuple(LinearPlan(f"block.{name}", WIDTH, WIDTH, False, True, WIDTH) for name in names)
    group = GroupPlan(prev="norm", layers=("up",), compensate=(), observe="up", norm_offset=0.0, prev_rows="all")
    plan = BlockPlan("language", "block", linears, (group,))
    (found,) = collect(model.block, plan, inputs, 0)
    return found, model


def batch(rows, calls_of_side, seed):
    x = torch.randn(1, rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    x[0, 0, 0] = calls_of_side
    return x


def test_later_batches_end_before_the_last_linear():
    batches = [batch(rows, 0, rows) for rows in (3, 4, 5)]
    found, model = statistics(batches)
    assert model.block.ran == 1, "only the first batch goes through the whole block"
    assert found["up"].n == found["down"].n == 12
    x = model.block.up(model.block.norm(torch.cat(batches, 1)))[0]
    torch.testing.assert_close(found["down"].gram, x.T @ x / 12)


def test_linears_that_are_called_more_often_later_lose_no_token():
    batches = [batch(4, 1, 1), batch(4, 2, 2), batch(4, 1, 3)]
    found, _ = statistics(batches, ("up", "down", "side"))
    assert found["side"].n == 16 and found["up"].n == found["down"].n == 12


@pytest.mark.parametrize("first", [0, 1])
def test_a_linear_that_the_first_batch_does_not_reach_is_awaited(first):
    batches = [batch(4, first, 1), batch(4, 1 - first, 2), batch(4, 1, 3)]
    found, _ = statistics(batches, ("up", "down", "side"))
    assert found["side"].n == 8 and found["down"].n == 12
