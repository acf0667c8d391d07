"""Ways in which the outputs of a linear may become the inputs of another, where attention stands between.

    rows = width     all of them
    rows < width     heads of values that several query heads share
    rows > width     the last rows of a fused projection, as a whole or of each head

What the size of a head is, some attribute of the block says; which, is tried out.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from awq_core.scale_groups import GroupPlan
from awq_core.shared_heads import SharedHeads


class HeadSizes:
    """The whole numbers that a block's modules hold under a name with "head" in it: path in the block -> value."""

    def __init__(self, block: nn.Module) -> None:
        found = [
            (f"{name}.{key}" if name else key, value)
            for name, module in block.named_modules()
            if not isinstance(module, nn.Linear)
            for key, value in vars(module).items()
            if isinstance(value, int) and not isinstance(value, bool) and value > 1 and not key.startswith("_")
        ]
        named = [one for one in found if "head" in one[0].rpartition(".")[2]]
        self.sizes = dict(sorted(named, key=lambda one: not _is_size(one[0])))

    def near(self, prev: str) -> list[tuple[str, int]]:
        """(path, size), those of the module that holds `prev` first; each size once."""
        by_size: dict[int, str] = {}
        for path, size in sorted(self.sizes.items(), key=lambda one: _parent(one[0]) != _parent(prev)):
            by_size.setdefault(size, path)
        return [(path, size) for size, path in by_size.items()]

    def of(self, prev: str) -> str:
        """The size that the module around `prev` has: with other numbers of heads its group needs it. Else ""."""
        return next((path for path in self.sizes if _parent(path) == _parent(prev) and _is_size(path)), "")

    def folds(self, prev: str, rows: int, width: int) -> Iterator[tuple[GroupPlan, str]]:
        """Ways in which `rows` outputs of `prev` may become `width` inputs, and the attribute that says how."""

        def plan(which: str, shared: SharedHeads | None = None, sections: int = 1) -> GroupPlan:
            return GroupPlan(prev, (), (), "", 0.0, which, shared=shared, sections=sections)

        if rows == width:
            yield plan("all"), ""
        elif rows < width:
            for path, size in self.near(prev):
                if width % rows == 0 and rows % size == 0:
                    yield plan("all", SharedHeads(width // rows, size)), path
        else:
            yield plan("last"), ""
            values = (rows - width) // 2  # of a fused qkv: keys and values are alike, queries as wide as what is read
            for path, size in self.near(prev):
                if (rows - width) % 2 == 0 and 0 < values <= width and width % values == 0 and values % size == 0:
                    shared = SharedHeads(width // values, size) if width > values else None
                    yield plan("last", shared), path
                    yield plan("heads", shared, values // size), path
                if width % size == 0 and rows % (width // size) == 0:
                    yield plan("kv_heads", None, width // size), path


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _is_size(path: str) -> bool:
    name = path.rpartition(".")[2]
    return "head" in name and ("dim" in name or "size" in name) and not name.startswith(("qk", "rope", "num"))
