"""`awq components`: what quantizing each part of a vision-language model costs, beside what it saves."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from awq_core.cli.options import (
    config_options,
    device_option,
    json_option,
    make_config,
    plugin_option,
    samples_option,
    trust_option,
)
from awq_core.cli.output import command_line, note, plural, print_json

if TYPE_CHECKING:
    from awq_core.components import ComponentEffect, ComponentEffects


@click.command(
    epilog="""\b
Examples:
  awq components MODEL --images photos/
  awq components MODEL --images photos/ --group-size 32 --measure 64
  awq components MODEL --images org/dataset --component language=keep --json
\b
Each component is quantized alone, in a temporary folder, calibrated on some of
the samples and compared with MODEL on others, at the tokens that predict text.
--component NAME=keep leaves one out. TMPDIR says where temporary folders are.
"""
)
@click.argument("model")
@click.option(
    "--images",
    required=True,
    metavar="FOLDER|FILE|DATASET",
    help="Images with captions: a folder, a file of messages, a hub dataset.",
)
@click.option(
    "--measure",
    type=click.IntRange(min=1),
    metavar="N",
    default=16,
    help="Samples to compare on, at most half of all; they are not calibrated on.",
)
@config_options
@samples_option
@device_option
@plugin_option
@trust_option
@json_option
def components(
    model: str,
    images: str,
    measure: int,
    samples: int,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
    **weights: Any,
) -> None:
    """Measure what quantizing each component of MODEL alone would cost: KL on prompts with images, and bytes saved."""
    config = make_config(**weights)
    from awq_core.cli.progress import quantizing
    from awq_core.components import component_effects

    with nullcontext() if as_json else quantizing(False) as progress:
        found = component_effects(
            model,
            images,
            config=config,
            samples=samples,
            measured=measure,
            plugin=plugin,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        print_json({"model": model, "config": config.to_dict(), **found.to_dict()})
        return
    tell(found)
    name = found.effects[0].component
    note(f"next: {command_line('awq', 'quantize', model, '--out', 'DIR', '--calib', images)} --component {name}=...")


def tell(found: ComponentEffects) -> None:
    """A row a component, and on what it was measured."""
    from awq_core.cli.compare_text import table
    from awq_core.sizes import size_text

    table(("component", "default", "saves", "KL", "top-1, %"), [_row(one) for one in found.effects], True)
    for one in found.effects:
        if one.reason:
            click.echo(f"{one.component} is not measured: {one.reason}")
    click.echo(
        f"KL to the original, nats a token, and likeliest tokens that stay, ± standard error over "
        f"{plural(found.measured, 'sample')} of {found.source} with {plural(found.positions, 'position')} of text; "
        f"calibrated on {found.calibrated} others; of {size_text(found.bytes_before)}"
    )


def _row(one: ComponentEffect) -> tuple[str, ...]:
    from awq_core.cli.compare_text import pm
    from awq_core.sizes import size_text

    kl = "" if one.kl is None else pm(one.kl, 5)
    top1 = "" if one.agreement is None else pm(one.agreement, 2, 100)
    return one.component, one.default, size_text(one.bytes_saved), kl, top1
