"""Recording block inputs: what models may do around their blocks, and what they are told when it cannot be followed."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from awq_core.calibration.trace import record
from awq_core.errors import PlanError

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds one; as a tuple if asked."""

    def __init__(self, as_tuple=False):
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        assert past_key_values is None, "a cache was replayed"
        return (hidden_states + 1,) if self.as_tuple else hidden_states + 1


class Model(nn.Module):
    """Three blocks, called in a way the test chooses."""

    def __init__(self, call, as_tuple=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(as_tuple) for _ in range(3)])
        self.call = call

    def forward(self, x, use_cache=False):
        for index, block in enumerate(self.blocks):
            x = self.call(block, x, index)
        return x


def replay(model):
    inputs = record(model, list(model.blocks), [{"x": X}])
    seen = []
    for index, block in enumerate(model.blocks):
        seen.append(inputs.hidden[0])
        inputs.advance(index, block)
    return inputs, seen


@pytest.mark.parametrize(
    ("call", "as_tuple"),
    [
        (lambda block, x, index: block(x), False),
        (lambda block, x, index: block(hidden_states=x), False),
        (lambda block, x, index: block(x)[0], True),
    ],
    ids=["positional", "keyword", "tuple"],
)
def test_blocks_are_replayed_as_the_model_calls_them(call, as_tuple):
    _, seen = replay(Model(call, as_tuple))
    for index, hidden in enumerate(seen):
        torch.testing.assert_close(hidden, X + index)


def test_what_the_model_adds_between_blocks_is_kept():
    _, seen = replay(Model(lambda block, x, index: block(x + 10 if index == 1 else x)))
    torch.testing.assert_close(seen[1], X + 11)
    torch.testing.assert_close(seen[2], X + 12)


def test_a_cache_the_model_insists_on_is_not_replayed():
    _, seen = replay(Model(lambda block, x, index: block(x, past_key_values=None)))
    model = Model(lambda block, x, index: block(x, past_key_values=DynamicCache()))
    _, cached = replay(model)
    torch.testing.assert_close(cached[2], seen[2])


def test_another_keyword_is_refused_with_the_remedy():
    with pytest.raises(PlanError, match=r"block 0 is called with x,.*block\(hidden_states"):
        replay(Model(lambda block, x, index: block(x=x)))


def test_the_blocks_work_again_afterwards():
    model = Model(lambda block, x, index: block(x))
    record(model, list(model.blocks), [{"x": X}])
    torch.testing.assert_close(model(X), X + 3)
