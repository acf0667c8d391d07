"""Results are compared with the annotations of their dataclasses."""

import collections

import pytest

from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, ScaleGroup
from awq_core.hooks.loading import RefusedError
from awq_core.hooks.values import boolean, mapping, mismatch, sequence_of

STACK = LayerStack(component="language", blocks="model.layers")
GROUP = {"prev": "norm", "layers": ("q",)}


def test_lists_and_tuples_become_tuples():
    check = sequence_of(LayerStack)
    assert check([STACK]) == check((STACK,)) == (STACK,)
    assert check([]) == ()


@pytest.mark.parametrize(
    "value", ["model.layers", b"x", 3, {STACK: 1}, {1}, STACK, iter([STACK]), (x for x in [STACK])]
)
def test_other_containers_are_refused(value):
    with pytest.raises(RefusedError, match="a list or tuple of LayerStack is expected"):
        sequence_of(LayerStack)(value)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("acorn", "item 0 is 'acorn'; Architecture is expected"),
        (
            Architecture(family="acorn", model_types="acorn", stacks=(STACK,)),
            "item 0: model_types is 'acorn'; a tuple is expected, with its comma: ('acorn',)",
        ),
        (
            Architecture(family="acorn", model_types=["acorn"], stacks=(STACK,)),
            "item 0: model_types is a list; a tuple is expected",
        ),
        (
            Architecture(family="acorn", model_types=(1,), stacks=(STACK,)),
            "item 0: model_types[0] is 1; str is expected",
        ),
        (
            Architecture(family="acorn", model_types=("a",), stacks=STACK),
            "item 0: stacks is a LayerStack; a tuple is expected",
        ),
        (
            Architecture(family="acorn", model_types=("a",), stacks=("layers",)),
            "item 0: stacks[0] is 'layers'; LayerStack is expected",
        ),
        (
            Architecture(family="a", model_types=("a",), stacks=(), scale_groups=(ScaleGroup(prev="n", layers="q"),)),
            "item 0: scale_groups[0]: layers is 'q'; a tuple is expected, with its comma: ('q',)",
        ),
        (
            Architecture(family="a", model_types=("a",), stacks=(), auto_module=("x",)),
            "item 0: auto_module is a tuple; str or None is expected",
        ),
    ],
)
def test_wrong_fields_are_named(value, wrong):
    with pytest.raises(RefusedError) as caught:
        sequence_of(Architecture)([value])
    assert str(caught.value) == f"returned a wrong value: {wrong}"


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (ScaleGroup(**GROUP, norm_offset=1), ""),
        (ScaleGroup(**GROUP, norm_offset="1"), "it: norm_offset is '1'; float is expected"),
        (ScaleGroup(**GROUP, norm_offset=True), "it: norm_offset is True; float is expected"),
        (ScaleGroup(**GROUP, optional=1), "it: optional is 1; bool is expected"),
        (
            ScaleGroup(**GROUP, prev_rows="first"),
            "it: prev_rows is 'first'; 'all' or 'last' or 'heads' or 'kv_heads' is expected",
        ),
        (ScaleGroup(**GROUP, observe="norm"), ""),
        (ComponentPolicy(component="v", action="keep", bits=8), ""),
        (ComponentPolicy(component="v", action="keep", bits=True), "it: bits is True; int or None is expected"),
        (ComponentPolicy(component="v", action="skip"), "it: action is 'skip'; 'quantize' or 'keep' is expected"),
    ],
)
def test_each_kind_of_annotation(value, wrong):
    assert mismatch(value, type(value), "it") == wrong


def test_boolean():
    assert boolean(True) is True and boolean(False) is False
    for value in (1, 0, "yes", []):
        with pytest.raises(RefusedError, match="True, False or None is expected"):
            boolean(value)


def test_mapping_becomes_a_plain_dict():
    assert mapping(collections.UserDict({"input_ids": 1})) == {"input_ids": 1}
    for value in ([("input_ids", 1)], "x", {1: 2}):
        with pytest.raises(RefusedError, match="a mapping from names of model inputs"):
            mapping(value)
