"""Numbered names made short: nothing is lost, nothing is added."""

import itertools
import random

import pytest

from awq_core.cli.collapse import collapse, ranges


def expand(line):
    """The names a collapsed line stands for."""
    segments = []
    for segment in line.split("."):
        runs = [run.split("-") for run in segment.split(",")]
        numbers = all(part.isdigit() for run in runs for part in run)
        segments.append(
            [str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)] if numbers else [segment]
        )
    return [".".join(choice) for choice in itertools.product(*segments)]


def test_ranges():
    assert ranges([5, 0, 1, 2, 2, 9, 8]) == "0-2,5,8-9"
    assert ranges([]) == ""


def test_one_pattern():
    assert collapse(f"model.layers.{i}.mlp.up" for i in range(32)) == ["model.layers.0-31.mlp.up"]


def test_two_numbers_are_collapsed_where_all_combinations_are_there():
    names = [f"layers.{i}.experts.{j}.up" for i in range(3) for j in range(4)]
    assert collapse([*names, "lm_head"]) == ["layers.0-2.experts.0-3.up", "lm_head"]
    assert collapse([*names, "layers.5.experts.1.up"]) == ["layers.0-2.experts.0-3.up", "layers.5.experts.1.up"]


def test_digits_inside_a_word_are_not_numbers():
    assert collapse(["w1", "w2", "fc1.0", "conv2d.fc2"]) == ["w1", "w2", "fc1.0", "conv2d.fc2"]


def test_linked_numbers_run_together():
    lines = [f"experts.{i}.up -> experts.{i}.down" for i in range(4)]
    assert collapse(lines, linked=True) == ["experts.0-3.up -> experts.0-3.down"]
    assert collapse(["norm -> experts.0-3.up, experts.0-3.gate"], linked=True) == [
        "norm -> experts.0-3.up, experts.0-3.gate"
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_collapsed_list_stands_for_exactly_its_names(seed):
    draw = random.Random(seed)
    every = [f"a.{i}.b.{j}.{leaf}" for i in range(4) for j in range(4) for leaf in ("up", "down.0", "down.1")]
    names = draw.sample(every, draw.randint(1, len(every)))
    expanded = [name for line in collapse(names) for name in expand(line)]
    assert sorted(expanded) == sorted(names)
