"""Paths in a block, and the globs that stand for many of them: `experts.3.up` -> `experts.*.up`.

Only a number that counts the members of a list of like modules becomes a star. In `mlp.0` and `mlp.2` of a sequence it
is a name.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def pattern(path: str, block: nn.Module) -> str:
    """`path` with a star for each index into a list of modules."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            holder = block.get_submodule(".".join(parts[:index]).replace("*", "0"))
            if isinstance(holder, nn.ModuleList) or hasattr(holder, "calibrating"):
                parts[index] = "*"
    return ".".join(parts)


def patterns(paths: Iterable[str], block: nn.Module) -> tuple[str, ...]:
    """The globs of several paths, each once, in order."""
    return tuple(dict.fromkeys(pattern(path, block) for path in paths))


def siblings(path: str, among: Iterable[str], block: nn.Module) -> list[str]:
    """The paths with the same pattern, `path` among them: an expert's linear, in every expert."""
    mine = pattern(path, block)
    return [name for name in among if pattern(name, block) == mine] if "*" in mine else [path]
