"""Long lists of numbered names, made short for reading without losing a name.

model.layers.0.mlp.up_proj ... model.layers.31.mlp.up_proj     ->  model.layers.0-31.mlp.up_proj
experts.0.up -> experts.0.down, experts.1.up -> experts.1.down ->  experts.0-1.up -> experts.0-1.down
"""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<![^\s.])\d+(?![^\s.,])")  # a path segment that is a number


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as runs: 0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def collapse(names: Iterable[str], *, linked: bool = False) -> list[str]:
    """Names that differ only in numbered segments, as one name with ranges; a result stands for exactly its names.

    Args:
        names: dotted paths, or lines with several.
        linked: one number that occurs twice in a line is the same thing twice, as an expert's number is in
            "experts.3.up -> experts.3.down"; both follow the same range.
    """
    families: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    places: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        found = [int(number) for number in NUMBER.findall(name)]
        distinct = list(dict.fromkeys(found)) if linked else found
        slots = [distinct.index(number) for number in found] if linked else list(range(len(found)))
        pieces = (*NUMBER.split(name), *map(str, slots))  # the text around the numbers, and which of them are one
        families.setdefault(pieces, set()).add(tuple(distinct))
        places[pieces] = slots
    lines = []
    for pieces, rows in families.items():
        for row in _merge(rows):
            numbers = [row[slot] for slot in places[pieces]]
            lines.append("".join(text + number for text, number in zip(pieces, [*numbers, ""], strict=False)))
    return lines


def _merge(rows: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Index tuples as tuples of ranges whose products are exactly the tuples given."""
    tails: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        if not row:
            return [()]
        tails.setdefault(row[0], set()).add(row[1:])
    heads: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for head in sorted(tails):
        heads.setdefault(tuple(_merge(tails[head])), []).append(head)
    return [(ranges(numbers), *tail) for merged, numbers in heads.items() for tail in merged]
