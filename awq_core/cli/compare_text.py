"""What `awq compare` prints for people: tables of what differs most, and the verdict last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from awq_core.cli.output import plural

if TYPE_CHECKING:
    from awq_core.evaluation import Comparison, WeightComparison
    from awq_core.evaluation.paired import Estimate

SHOWN = 10


def tell_weights(weights: WeightComparison, show_all: bool) -> None:
    """Shares over all linears, the linears that differ most, and what only one folder quantizes."""
    if weights.equal:
        click.echo(f"weights: the same in all {plural(len(weights.linears), 'quantized linear')}")
        return
    total = f"weights: {plural(len(weights.linears), 'linear')} quantized in both"
    if weights.codes is None or weights.groups is None:
        sizes = " and ".join(map(str, weights.group_sizes))
        total += f"; groups of {sizes}: codes are not comparable, weights are"
    else:
        total += f", {weights.codes:.2%} of codes differ, {weights.groups:.2%} of groups"
    click.echo(total)
    worst = sorted(weights.linears, key=lambda linear: (linear.weight, linear.codes or 0.0), reverse=True)
    rows = [(one.name, share(one.codes), share(one.groups), f"{one.weight:.4f}") for one in worst]
    table(("linear", "codes", "groups", "weight"), rows, show_all)
    for name, only in (("A", weights.only_a), ("B", weights.only_b)):
        if only:
            click.echo(f"quantized in {name} only: {listed(only, show_all)}")
    if weights.others:
        click.echo(f"beside them, {plural(len(weights.others), 'tensor')} differ: {listed(weights.others, show_all)}")
        click.echo("(scales are folded into such tensors: weights of the linears that read them differ for that alone)")


def tell_models(apart: Comparison, show_all: bool) -> None:
    """The blocks that differ most, the three measures, and which one is closer."""
    if apart.blocks:
        worst = sorted(apart.blocks, key=lambda block: abs(block.a - block.b), reverse=True)
        rows = [(one.name, f"{one.a:.5f}", f"{one.b:.5f}", f"{one.a - one.b:+.5f}") for one in worst]
        table(("block, output error", "A", "B", "A - B"), rows, show_all)
    perplexity, kl, top1 = apart.perplexity, apart.kl, apart.agreement
    rows = [
        ("perplexity", pm(perplexity.a, 3), pm(perplexity.b, 3), signed(perplexity.difference, 3)),
        ("KL", pm(kl.a, 5), pm(kl.b, 5), signed(kl.difference, 5)),
        ("top-1, %", pm(top1.a, 2, 100), pm(top1.b, 2, 100), signed(top1.difference, 2, 100)),
    ]
    table(("to original", "A", "B", "A - B"), rows, True)
    click.echo(f"perplexity of the original: {pm(apart.original, 3)}; KL: nats a token")
    click.echo(
        f"{plural(apart.windows, 'window')} of {apart.window} tokens, ± standard error, of A - B paired over windows; "
        f"blocks: the first {apart.block_windows}"
    )
    click.echo(verdict(apart))


def verdict(apart: Comparison) -> str:
    """One line: which is closer to the original, or that nobody can say."""
    kl = apart.kl
    if apart.closer is None:
        if kl.difference.mean == 0:
            return f"A and B are equally close: KL {pm(kl.a, 4)} for both"
        reason = "one window has no error bar" if math.isnan(kl.difference.stderr) else "less than 2 standard errors"
        gap = signed(kl.difference, 4)
        return f"A and B cannot be told apart: KL {pm(kl.a, 4)} and {pm(kl.b, 4)}, difference {gap} ({reason})"
    winner, loser = (kl.a, kl.b) if apart.closer == "a" else (kl.b, kl.a)
    gap = signed(replace(kl.difference, mean=-abs(kl.difference.mean)), 4)
    return f"{apart.closer.upper()} is closer: KL {pm(winner, 4)} against {pm(loser, 4)}, difference {gap}"


def pm(value: Estimate, digits: int, unit: float = 1.0) -> str:
    """ "0.0233 ± 0.0008"; without the error where there is none."""
    error = "" if math.isnan(value.stderr) else f" ± {value.stderr * unit:.{digits}f}"
    return f"{value.mean * unit:.{digits}f}{error}"


def signed(value: Estimate, digits: int, unit: float = 1.0) -> str:
    """A difference, with its sign."""
    return ("+" if value.mean > 0 else "") + pm(value, digits, unit)


def share(value: float | None) -> str:
    """A share as a percentage; empty where there is none."""
    return "" if value is None else f"{value:.2%}"


def listed(names: Sequence[str], show_all: bool) -> str:
    """Names in one line, a few of many."""
    few = names if show_all else names[:3]
    return ", ".join(few) + (f" and {len(names) - len(few)} more" if len(few) < len(names) else "")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], show_all: bool) -> None:
    """Rows under their titles, the first ten unless all are asked for."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table()
    for number, title in enumerate(titles):
        # Numbers keep their line and names are folded: a name cut short could not be looked up.
        drawn.add_column(title, justify="right" if number else "left", no_wrap=bool(number), overflow="fold")
    for row in rows if show_all else rows[:SHOWN]:
        drawn.add_row(*row)
    Console().print(drawn)
    if not show_all and len(rows) > SHOWN:
        click.echo(f"{len(rows) - SHOWN} more, less different: --all shows them")
