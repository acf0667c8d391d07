"""Recording block inputs: what models may do around their blocks, and what they are told when it cannot be followed."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from awq_core.calibration.trace import record
from awq_core.errors import PlanError

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Adds one; first in a tuple of so many, if asked."""

    def __init__(self, members=0):
        super().__init__()
        self.members = members

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        assert past_key_values is None, "a cache was replayed"
        out = hidden_states + 1
        return (out, *["more"] * (self.members - 1)) if self.members else out


class Model(nn.Module):
    """Three blocks, called in a way the test chooses."""

    def __init__(self, call, members=0):
        super().__init__()
        self.blocks = nn.ModuleList([Block(members) for _ in range(3)])
        self.call = call

    def forward(self, x, use_cache=False):
        for index, block in enumerate(self.blocks):
            x = self.call(block, x, index)
        return x


def first_of_two(returned):
    first, _ = returned
    return first


def first_of_three(returned):
    first, _, _ = returned
    return first


def replay(model, x=X):
    inputs = record(model, list(model.blocks), [{"x": x}])
    seen = []
    for index, block in enumerate(model.blocks):
        seen.append(inputs.hidden[0])
        inputs.advance(index, block)
    return inputs, seen


@pytest.mark.parametrize(
    ("call", "members"),
    [
        (lambda block, x, index: block(x), 0),
        (lambda block, x, index: block(hidden_states=x), 0),
        (lambda block, x, index: block(x)[0], 1),
        (lambda block, x, index: block(x)[0], 2),
        (lambda block, x, index: first_of_two(block(x)), 2),
        (lambda block, x, index: first_of_three(block(x)), 3),
    ],
    ids=["positional", "keyword", "tuple", "pair", "unpacked pair", "unpacked triple"],
)
@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_blocks_are_replayed_as_the_model_calls_them(call, members, batch):
    x = X[:1].expand(batch, -1, -1)
    _, seen = replay(Model(call, members), x)
    for index, hidden in enumerate(seen):
        torch.testing.assert_close(hidden, x + index)


class Singular(Block):
    """Calls its input `hidden_state`, as some vision towers do."""

    def forward(self, hidden_state, mask):
        assert mask == "mask"
        return super().forward(hidden_state)


def test_a_block_may_call_its_input_hidden_state():
    model = Model(lambda block, x, index: block(hidden_state=x, mask="mask"))
    model.blocks = nn.ModuleList([Singular() for _ in range(3)])
    _, seen = replay(model)
    torch.testing.assert_close(seen[2], X + 2)


def test_an_error_of_the_model_stays_one():
    def call(block, x, index):
        first, second = "abc"
        return block(x) + first + second

    with pytest.raises(ValueError, match="too many values to unpack"):
        replay(Model(call))


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


class Leaves(nn.Module):
    """Leaves its output in a mapping."""

    def forward(self, hidden_states, shared):
        shared["left"] = 10 * hidden_states
        return hidden_states + 1


class Takes(nn.Module):
    """Adds what an earlier block left."""

    def forward(self, hidden_states, shared):
        return hidden_states + shared["left"]


class Handing(nn.Module):
    """Its last block takes what the first one left, of the same pass."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Leaves(), Takes()])

    def forward(self, x, use_cache=False):
        shared = {}
        for block in self.blocks:
            x = block(x, shared=shared)
        return x


def test_what_blocks_leave_for_later_ones_is_kept_apart_by_version_and_batch():
    model = Handing()
    inputs = record(model, list(model.blocks), [{"x": X}, {"x": 2 * X}])
    inputs.feeds = True
    inputs.fork()
    inputs.original = [3 * kept for kept in inputs.original]
    first, last = model.blocks
    inputs.advance_original(0, first)
    inputs.advance(0, first)
    for batch, times in enumerate((1, 2)):
        call = inputs.calls[1][batch]
        original = call.run_original(last, inputs.original[batch])
        torch.testing.assert_close(original, model(3 * times * X))
        torch.testing.assert_close(call.run(last, inputs.hidden[batch]), model(times * X))
    inputs.advance(1, last)
    torch.testing.assert_close(inputs.hidden[1], model(2 * X))
