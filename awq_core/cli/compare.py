"""`awq compare`: two quantized folders, weight by weight and, beside the original, which of them is closer to it."""

from __future__ import annotations

from typing import Any

import click

from awq_core.cli.eval_text import DIVERGENCE_WINDOW, eval_text
from awq_core.cli.options import (
    device_option,
    json_option,
    plugin_option,
    split_option,
    text_option,
    trust_option,
)
from awq_core.cli.output import command_line, note, print_json

BUILTIN_WINDOWS = 64
# Options that mean nothing where no model is run.
RUNNING = ("source", "split", "window", "max_windows")


@click.command(
    epilog="""\b
Examples:
  awq compare A B
  awq compare A B --reference MODEL
  awq compare A B --reference MODEL --text notes.txt --all
  awq compare A B --reference MODEL --json > comparison.json
\b
A, B and MODEL are folders or hub names. The first compares weights only, and
builds no model; the others run all three models on the same windows of text.
"""
)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--reference", metavar="ORIGINAL", help="The unquantized model of both: which one is closer to it?")
@text_option
@split_option
@click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="N",
    help=f"Tokens a window.  [default: {DIVERGENCE_WINDOW}, or the model's context]",
)
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Stop after so many windows.  [default: all; {BUILTIN_WINDOWS} of the default text]",
)
@click.option("--all", "show_all", is_flag=True, help="Show every block and linear, not the most different ten.")
@device_option
@plugin_option
@trust_option
@json_option
@click.pass_context
def compare(
    ctx: click.Context,
    a: str,
    b: str,
    reference: str | None,
    source: str | None,
    split: str | None,
    window: int | None,
    max_windows: int | None,
    show_all: bool,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Compare two quantized folders of one model: codes that differ and, with --reference, which one is closer."""
    typed = next((param for param in ctx.command.params if param.name in RUNNING and ctx.params[param.name]), None)
    if reference is None and typed is not None:
        raise click.UsageError(f"{typed.opts[0]} needs --reference: without it no model is run")
    from awq_core.cli import models
    from awq_core.cli.compare_text import tell_models, tell_weights
    from awq_core.cli.progress import measuring
    from awq_core.evaluation import compare_models, compare_weights

    given = tokenizer = apart = None
    length = window or DIVERGENCE_WINDOW
    if reference is not None:  # a wrong name is found before the weights are read
        given = eval_text(source, split, length, max_windows or (BUILTIN_WINDOWS if source is None else None))
        note(f"text: {given.name}")
        tokenizer = models.open_tokenizer(reference, trust_remote_code=trust_remote_code)
    with measuring("weights", as_json) as progress:
        weights = compare_weights(a, b, progress=progress)
    result: dict[str, Any] = {"a": a, "b": b, "weights": weights.to_dict(), "reference": None}
    if reference is not None and given is not None:
        original, first, second = (
            models.open_model(name, device=device, plugin=plugin, trust_remote_code=trust_remote_code)
            for name in (reference, a, b)
        )
        with measuring("windows", as_json) as progress:
            apart = compare_models(
                *(original, first, second, tokenizer, given.text),
                window=length,
                max_windows=given.windows,
                progress=progress,
            )
        result["reference"] = {"model": reference, "text": given.name, **apart.to_dict()}
    if as_json:
        print_json(result)
        return
    tell_weights(weights, show_all)
    if apart is None:
        note(f"\nnext: {command_line('awq', 'compare', a, b, '--reference', 'ORIGINAL')}")
    else:
        click.echo()
        tell_models(apart, show_all)
