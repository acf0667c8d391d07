"""`awq plan`: what quantization would do to every weight, told before any weight is read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from awq_core.cli.options import (
    given_options,
    infer_option,
    json_option,
    make_config,
    plugin_option,
    trust_option,
    weight_options,
)
from awq_core.cli.recipe import recipe_option

if TYPE_CHECKING:
    from awq_core.kernels.survey import Runner
    from awq_core.plan_types import Plan


@click.command(
    epilog="""\b
Examples:
  awq plan MODEL
  awq plan MODEL --group-size 32 --component vision=4bit
  awq plan --recipe recipe.yaml
  awq plan MODEL --infer
  awq plan org/name --json > plan.json
\b
MODEL is a folder or a hub name; of a hub model, only the small files are fetched.
"""
)
@click.argument("model")
@recipe_option
@weight_options
@plugin_option
@infer_option
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
    infer: bool,
    trust_remote_code: bool,
    as_json: bool,
    **weights: Any,
) -> None:
    """Say what quantization would do to every weight of MODEL, from its config.json alone."""
    config = make_config(**weights)
    import awq_core
    from awq_core.cli.inferring import manager_for
    from awq_core.cli.output import command_line, note, print_json
    from awq_core.cli.plan_text import describe, kernel_lines

    decided = awq_core.plan(
        model,
        config=config,
        plugin=plugin,
        trust_remote_code=trust_remote_code,
        samples=samples,
        seq_len=seq_len,
        manager=manager_for(model, infer=infer, plugin=plugin, trust_remote_code=trust_remote_code),
    )
    device, dtype, kernels = kernels_here(decided, model, trust_remote_code)
    if as_json:
        running = {"device": device, "dtype": dtype, "kernels": [asdict(one) for one in kernels]}
        print_json({**decided.to_dict(), "running": running})
        return
    for line in describe(decided):
        click.echo(line)
    for line in kernel_lines(device, dtype, kernels):
        click.echo(line)
    for name in decided.unused_names():
        note(f"no linear's name contains {name!r}: nothing is kept by it")
    note(f"\nnext: {command_line('awq', 'quantize', model, *given_options(ctx), '--out', 'DIR')}")


def kernels_here(decided: Plan, model: str, trust_remote_code: bool) -> tuple[str, str, tuple[Runner, ...]]:
    """Device and dtype in which `awq_core.load` and `--device auto` would run the result on this machine, and the
    kernels of its 4-bit linears."""
    from awq_core.devices import dtype_name, pick_device, pick_dtype
    from awq_core.hooks.manager import default_manager
    from awq_core.kernels.survey import runners
    from awq_core.model_folder import load_config, resolve

    config = load_config(resolve(model, weights=False), trust_remote_code=trust_remote_code)
    dtype = pick_dtype(getattr(config, "dtype", None) or "float32")
    device = pick_device("auto").type
    shapes = [(one.in_features, one.out_features, one.group_size) for one in decided.linears if one.quantize]
    return device, dtype_name(dtype), runners(shapes, dtype, device, default_manager().kernel_backends())
