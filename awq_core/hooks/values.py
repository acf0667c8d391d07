"""Checks on what a hook returned: a wrong type is reported at the hook, not three layers further on.

The dataclasses of `types.py` are compared with their own annotations. That catches the classic
`model_types=("acorn")`, a string without its comma, before it is read as five model types of one letter.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from awq_core.hooks.loading import PluginInfo, RefusedError, is_requirement
from awq_core.hooks.types import Architecture, KernelBackend

T = TypeVar("T")


def sequence_of(kind: type[T]) -> Callable[[object], tuple[T, ...]]:
    """A check for "a list or tuple of `kind`", which returns a tuple."""

    def check(value: object) -> tuple[T, ...]:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise RefusedError(f"returned {_shown(value)}; a list or tuple of {kind.__name__} is expected")
        for index, item in enumerate(value):
            if wrong := mismatch(item, kind, f"item {index}"):
                raise RefusedError(f"returned a wrong value: {wrong}")
        return tuple(value)

    return check


def boolean(value: object) -> bool:
    """A check for True or False."""
    if not isinstance(value, bool):
        raise RefusedError(f"returned {_shown(value)}; True, False or None is expected")
    return value


def mapping(value: object) -> dict[str, Any]:
    """A check for a mapping with string keys, which returns a plain dict, fit for `model(**batch)`."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RefusedError(f"returned {_shown(value)}; a mapping from names of model inputs to tensors is expected")
    return dict(value)


def collected(
    architectures: Sequence[Architecture],
    backends: Sequence[KernelBackend],
    taken: Mapping[str, tuple[PluginInfo, KernelBackend]],
) -> None:
    """What the types of a plugin's collected values cannot say. `taken`: the kernel backends known so far."""
    for arch in architectures:
        if not arch.model_types and not arch.class_names:
            raise RefusedError(f"architecture {arch.family!r} claims no model: set model_types or class_names")
        if bad := [text for text in arch.requires if not is_requirement(text)]:
            raise RefusedError(f"architecture {arch.family!r} requires {bad[0]!r}, which is no PEP 508 requirement")
    for backend in backends:
        if backend.name in taken:
            raise RefusedError(f"kernel backend {backend.name!r} is brought by {taken[backend.name][0].label} already")


def mismatch(value: Any, expected: Any, where: str) -> str:
    """How `value` differs from the type `expected`, in one line; empty when it does not."""
    origin, args = get_origin(expected), get_args(expected)
    if is_dataclass(expected):
        if not isinstance(value, expected):  # type: ignore[arg-type]
            return f"{where} is {_shown(value)}; {expected.__name__} is expected"  # type: ignore[union-attr]
        fields = ((name, kind, f"{where}: {name}") for name, kind in _fields(expected).items())  # type: ignore[arg-type]
        return next((wrong for name, kind, at in fields if (wrong := mismatch(getattr(value, name), kind, at))), "")
    if origin is tuple:
        if not isinstance(value, tuple):
            comma = f", with its comma: ({value!r},)" if isinstance(value, str) else ""
            return f"{where} is {_shown(value)}; a tuple is expected{comma}"
        wrongs = (mismatch(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
        return next(filter(None, wrongs), "")
    if origin is Literal:
        right = " or ".join(map(repr, args))
        return "" if value in args else f"{where} is {_shown(value)}; {right} is expected"
    if origin in (Union, types.UnionType):
        if any(not mismatch(value, arg, where) for arg in args):
            return ""
        return f"{where} is {_shown(value)}; {' or '.join(map(_named, args))} is expected"
    kinds = (int, float) if expected is float else expected
    if isinstance(value, kinds) and isinstance(value, bool) == (expected is bool):  # True is an int to Python
        return ""
    return f"{where} is {_shown(value)}; {_named(expected)} is expected"


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _named(kind: Any) -> str:
    return "None" if kind is type(None) else kind.__name__


def _shown(value: object) -> str:
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)
    return f"a {type(value).__name__}"
