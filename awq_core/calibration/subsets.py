"""Parts of a mixed corpus by name, as in The Pile, whose rows say where they came from:

    {"text": "...", "meta": {"pile_set_name": "ArXiv"}}

A sample keeps that name beside its text, so that samples can be chosen by it, measured by it, and counted by it: what a
model was calibrated on is then known in tokens a subset, not only by the name of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from awq_core.errors import CalibrationError

# The key in The Pile's `meta`, and in our samples.
SUBSET = "pile_set_name"


@dataclass(frozen=True, slots=True)
class Subsets:
    """Which subsets to read: those in `include`, or all where it is empty, without those in `exclude`.

    Names are compared without regard to case.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def parse(cls, include: str | None, exclude: str | None) -> Subsets:
        """From comma-separated names: "ArXiv,Github"."""

        def names(text: str | None) -> tuple[str, ...]:
            return tuple(name.strip() for name in (text or "").split(",") if name.strip())

        return cls(names(include), names(exclude))

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def takes(self, name: str) -> bool:
        """Whether a subset of this name is read."""
        folded = name.casefold()
        included = not self.include or folded in {one.casefold() for one in self.include}
        return included and folded not in {one.casefold() for one in self.exclude}

    def select(self, samples: Iterable[Mapping[str, Any]], source: str) -> Iterator[dict[str, Any]]:
        """The samples of the subsets that are read, one at a time.

        Raises:
            CalibrationError: a sample without a subset's name; none of this selection in the whole source.
        """
        found: set[str] = set()
        taken = False
        for number, sample in enumerate(samples, 1):
            name = sample.get(SUBSET)
            if name is None:
                raise CalibrationError(
                    f"{source}: sample {number} names no subset (meta.{SUBSET})", hint="leave the choice of subsets out"
                )
            found.add(name)
            if self.takes(name):
                taken = True
                yield dict(sample)
        if not taken:
            raise CalibrationError(
                f"{source} has nothing of the subsets chosen",
                hint=f"it has: {', '.join(sorted(found)) or 'no samples'}",
            )

    def __str__(self) -> str:
        """ "ArXiv, Github", "all but Github"."""
        kept = ", ".join(self.include) or "all"
        return kept + (f" but {', '.join(self.exclude)}" if self.exclude else "")


def subset_of(row: Mapping[str, Any]) -> str | None:
    """The subset a row says it is of, in `meta` or beside the text; None where it says nothing."""
    meta = row.get("meta")
    for place in (meta, row):
        name = place.get(SUBSET) if isinstance(place, Mapping) else None
        if isinstance(name, str) and name:
            return name
    return None


def shares(counts: Iterable[tuple[str, int]]) -> str:
    """ "ArXiv 60.1%, Github 39.9%", the largest first."""
    ordered = sorted(counts, key=lambda item: (-item[1], item[0]))
    total = sum(count for _, count in ordered)
    return ", ".join(f"{name} {count / total:.1%}" for name, count in ordered) if total else ""
