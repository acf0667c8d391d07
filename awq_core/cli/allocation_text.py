"""What mixed precision chose, as a table: a row a block, a column a kind of unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from awq_core.mixed import Allocation


def allocation_text(allocation: Allocation) -> list[str]:
    """Sensitivity and bits of each unit, and what they come to."""
    from awq_core.sizes import size_text

    columns = list(dict.fromkeys(choice.title for choice in allocation.choices))
    rows: dict[str, dict[str, str]] = {}
    for choice in allocation.choices:
        cell = f"{choice.cost * 1e3:.3f}  {'16' if choice.kept else ' 4'}"
        rows.setdefault(choice.unit.block, {})[choice.title] = cell
    first = max(map(len, rows), default=0)
    widths = {one: max(len(one), *(len(row.get(one, "")) for row in rows.values())) for one in columns}
    lines = ["expected KL of 4 bits in each unit, in 1/1000 nat a token, and the bits it gets"]
    lines.append(" " * first + "".join(f"   {one:>{widths[one]}}" for one in columns))
    for block, row in rows.items():
        lines.append(f"{block:{first}}" + "".join(f"   {row.get(one, ''):>{widths[one]}}" for one in columns))
    left = sum(choice.cost for choice in allocation.choices if not choice.kept) * 1e3
    share = left / (sum(choice.cost for choice in allocation.choices) * 1e3 or 1.0)
    lines.append(
        f"{allocation.kept} of {len(allocation.choices)} units stay in 16 bits: {allocation.bits:.3f} bits a weight, "
        f"{size_text(allocation.size)}, {share:.0%} of the expected KL is left"
    )
    return [line.rstrip() for line in lines]
