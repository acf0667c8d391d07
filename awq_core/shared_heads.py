"""Grouped-query attention: value head h is read by query heads h·r to h·r + r − 1, so their scales are tied.

The value linear writes kv·d channels, the output projection reads r·kv·d. Channel (q, j) of the latter is channel
(q // r, j) of the former, with q the query head and j < d the place in it. 1/s can be folded into the values only if

    s[q, j] = t[q // r, j]        t: one scale for each channel the values have

`pool` and `first` go from the wide side to the narrow one, `spread` comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SharedHeads:
    """How a narrow tensor's heads repeat in the wide one that is read.

    Attributes:
        repeats: r, the consecutive heads of the wide tensor that one head of the narrow one becomes.
        head_dim: d, the channels of one head.
    """

    repeats: int
    head_dim: int

    def pool(self, wide: torch.Tensor) -> torch.Tensor:
        """Means over tied channels, `[r·kv·d]` -> `[kv·d]`. Of E|x| or of column means it is the same statistic again,
        taken over all that one scale is multiplied with."""
        return self._apart(wide).mean(1).flatten()

    def first(self, wide: torch.Tensor) -> torch.Tensor:
        """One of each set of tied channels, `[r·kv·d]` -> `[kv·d]`: exact where they are equal."""
        return self._apart(wide)[:, 0].flatten()

    def spread(self, narrow: torch.Tensor) -> torch.Tensor:
        """Every head r times in a row, `[kv·d]` -> `[r·kv·d]`."""
        return narrow.view(-1, self.head_dim).repeat_interleave(self.repeats, dim=0).flatten()

    def _apart(self, wide: torch.Tensor) -> torch.Tensor:
        return wide.view(-1, self.repeats, self.head_dim)


def shared_heads(narrow: int, wide: int, block: Any, path: str) -> SharedHeads | str:
    """How `narrow` channels repeat in `wide` ones, or why that is not known.

    Args:
        path: of the attribute of `block` that is the size of one head; "" where none is declared.
    """
    if not path:
        return "where query heads share value heads, head_dim says how"
    size = reduce(lambda at, name: getattr(at, name, None), path.split("."), block)
    if not isinstance(size, int) or size < 1:
        return f"{path} is no size of a head here"
    if narrow % size or wide % narrow:
        return f"heads of {size} channels do not share evenly"
    return SharedHeads(wide // narrow, size)
