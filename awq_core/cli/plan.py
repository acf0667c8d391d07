"""`awq plan`: what quantization would do to every weight, told before any weight is read."""

from __future__ import annotations

from typing import Any

import click

from awq_core.cli.options import given_options, json_option, make_config, plugin_option, trust_option, weight_options
from awq_core.cli.recipe import recipe_option


@click.command(
    epilog="""\b
Examples:
  awq plan MODEL
  awq plan MODEL --group-size 32 --component vision=4bit
  awq plan --recipe recipe.yaml
  awq plan org/name --json > plan.json
\b
MODEL is a folder or a hub name; of a hub model, only the small files are fetched.
"""
)
@click.argument("model")
@recipe_option
@weight_options
@plugin_option
@trust_option
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    model: str,
    recipe: str | None,
    samples: int,
    seq_len: int,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **weights: Any,
) -> None:
    """Say what quantization would do to every weight of MODEL, from its config.json alone."""
    config = make_config(**weights)
    import awq_core
    from awq_core.cli.output import command_line, note, print_json
    from awq_core.cli.plan_text import describe

    decided = awq_core.plan(
        model,
        config=config,
        plugin=plugin,
        trust_remote_code=trust_remote_code,
        samples=samples,
        seq_len=seq_len,
    )
    if as_json:
        print_json(decided.to_dict())
        return
    for line in describe(decided):
        click.echo(line)
    for name in decided.unused_names():
        note(f"no linear's name contains {name!r}: nothing is kept by it")
    note(f"\nnext: {command_line('awq', 'quantize', model, *given_options(ctx), '--out', 'DIR')}")
