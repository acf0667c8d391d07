"""The rules a hook implementation must keep, checked when a plugin is registered.

pluggy by itself accepts a misspelled hook in silence, and its versions disagree on the rest: given the implementation
`def hook(x, y=99)` and a call with `y=2`, pluggy 1.6 passes 99 and pluggy 1.7 passes 2. What could be read in two
ways is refused here, each time with the name or form that is right.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from awq_core.hooks import specs

MARKED = "awq_impl"  # the attribute pluggy's HookimplMarker("awq") leaves on a function
PREFIX = "awq_"

HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(value).parameters)
    for name, value in vars(specs).items()
    if name.startswith(PREFIX) and inspect.isfunction(value)
}
"""Every hook and the names of its arguments, in the order of `specs`."""


def implemented(plugin: object) -> tuple[str, ...]:
    """The hooks that `plugin` implements, in the order of `specs`."""
    return tuple(name for name in HOOKS if _options(getattr(plugin, name, None)) is not None)


def problems(plugin: object) -> list[str]:
    """Every rule that `plugin` breaks, one line each; empty when it breaks none."""
    found, marks = [], 0
    for name in sorted(dir(plugin)):
        static = inspect.getattr_static(plugin, name, None)
        marked = _options(static) is not None or _options(getattr(static, "__func__", None)) is not None
        if not marked and not name.startswith(PREFIX):
            continue  # also keeps properties of an unrelated name from being evaluated
        value = getattr(plugin, name)
        if inspect.ismodule(value) or inspect.isclass(value) or not callable(value):
            continue
        options = _options(value)
        if options is None or not (inspect.isfunction(value) or inspect.ismethod(value)):
            found.append(_unmarked(name))
        else:
            marks += 1
            found.extend(_rules(name, value, options))
    if not found and not marks:
        found.append(f"it implements no hook; known: {', '.join(HOOKS)}")
    return found


def _rules(name: str, function: Any, options: dict[str, Any]) -> list[str]:
    if options.get("specname"):
        return [f"{name} uses specname; name the function {options['specname']} instead"]
    if name not in HOOKS:
        # optionalhook is pluggy's way to say "a newer core may have it"
        return [] if options.get("optionalhook") else [f"{name} is not a hook{_did_you_mean(name, HOOKS)}"]
    for option in ("wrapper", "hookwrapper", "trylast"):
        if options.get(option):
            return [
                f"{name} uses {option}, which has no meaning here: the owner is asked, then the core's defaults; "
                f"to change a default, call awq_core.hooks.defaults.{name} and return the changed result"
            ]
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return [f"{name} must be a plain function that returns its result (no yield, no async)"]
    return [problem for p in inspect.signature(function).parameters.values() if (problem := _parameter(name, p))]


def _parameter(hook: str, parameter: inspect.Parameter) -> str:
    name, right = parameter.name, f"{hook}({', '.join(HOOKS[hook])})"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return f"{hook} takes *{name}; name the arguments it needs: {right}"
    if name not in HOOKS[hook]:
        return f"{hook} has an unknown parameter {name!r}{_did_you_mean(name, HOOKS[hook])}: {right}"
    if parameter.default is not parameter.empty:
        return f"{hook} gives {name!r} a default; write {name!r} without one: {right}"
    if parameter.kind is parameter.KEYWORD_ONLY:
        return f"{hook} makes {name!r} keyword-only; remove the '*' before it: {right}"
    return ""


def _unmarked(name: str) -> str:
    if name in HOOKS:
        return f"{name} lacks the marker: put @awq_core.hooks.hookimpl on a plain function (below any @staticmethod)"
    hint = _did_you_mean(name, HOOKS)
    return f"{name} lacks the @hookimpl marker and is not a hook{hint}; names that start with 'awq_' are reserved"


def _did_you_mean(name: str, names: Any) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names) or 'none, it takes no arguments'}"


def _options(function: object) -> dict[str, Any] | None:
    options = getattr(function, MARKED, None)
    return options if isinstance(options, dict) else None
