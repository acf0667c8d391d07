"""The four environment variables that steer plugins, and what they print.

`AWQ_PLUGINS=a,b` loads these plugins or distributions only (empty: none), `AWQ_PLUGIN_PREFER=a` settles claims made
twice, `AWQ_STRICT_PLUGINS=1` makes a plugin that does not load fatal, `AWQ_TRACE_PLUGINS=1` prints every hook call.
"""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Mapping, Sequence

from awq_core.hooks.loading import Found
from awq_core.hooks.types import Architecture, LayerStack

_short = reprlib.Repr()
_short.maxother = _short.maxstring = 120


def names(variable: str) -> tuple[str, ...] | None:
    """A comma-separated variable; None when it is not set, () when it is empty."""
    value = os.environ.get(variable)
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


def flag(variable: str) -> bool:
    """Whether a variable is switched on."""
    return os.environ.get(variable, "0") not in ("", "0")


def reminders(allow: Sequence[str] | None, found: Sequence[Found]) -> list[str]:
    """What to say of an allow-list: one forgotten in a shell, or with a typo in it, is otherwise hard to notice."""
    if allow is None:
        return []
    known = {name for one in found for name in (one.name, one.dist)}
    lines = [f"plugin {name!r} is allowed but not installed" for name in allow if name not in known]
    if blocked := [one.name for one in found if not {one.name, one.dist} & set(allow)]:
        lines.append(f"plugins blocked by the allow-list (AWQ_PLUGINS): {', '.join(blocked)}")
    return lines


def trace(who: str, hook: str, arguments: Mapping[str, object], answer: object) -> None:
    """With `AWQ_TRACE_PLUGINS=1`, print one hook call, the plugin that was asked and what it answered."""
    if flag("AWQ_TRACE_PLUGINS"):
        shown = ", ".join(f"{name}={_argument(value)}" for name, value in arguments.items())
        result = " ".join(_short.repr(answer).split())
        print(f"awq trace: {hook}({shown}) -> {who}: {result[:200]}", file=sys.stderr)


def _argument(value: object) -> str:
    if isinstance(value, Architecture):
        return value.family
    if isinstance(value, LayerStack):
        return value.component
    return repr(value) if isinstance(value, (str, int)) else f"<{type(value).__name__}>"  # a model's repr fills screens
