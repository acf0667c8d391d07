"""Options that several commands share, and how those about weights become a `QuantConfig`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from awq_core.config import CLIPS, COMPONENT_CHOICES, GROUP_SIZES, ROUNDINGS, QuantConfig, check_component
from awq_core.errors import ConfigError

Decorator = Callable[[Any], Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print data on stdout instead of text.")
plugin_option = click.option("--plugin", metavar="NAME", help="The plugin to use where two claim the model.")
infer_option = click.option(
    "--infer", is_flag=True, help="Where no plugin claims MODEL: infer its scale groups, and use them if proved."
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that the model folder brings."
)
device_option = click.option(
    "--device", default="auto", metavar="DEVICE", help="cpu, cuda, cuda:1; auto is CUDA where there is one."
)
text_option = click.option(
    "--text",
    "source",
    metavar="FILE|DATASET",
    help="Text to measure on.  [default: the Python standard library's source]",
)
split_option = click.option("--split", help="Split of a hub dataset.  [default: train]")


class Components(click.ParamType):
    """`NAME=keep` or `NAME=4bit`."""

    name = "NAME=CHOICE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, choice = str(value).partition("=")
        if not name or not equals or not choice:
            choices = " or ".join(f"{name or 'vision'}={one}" for one in COMPONENT_CHOICES)
            self.fail(f"{value!r} is not NAME=CHOICE, such as {choices}", param, ctx)
        try:
            check_component(name, choice)
        except ConfigError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)
        return name, choice


_WEIGHTS: tuple[Decorator, ...] = (
    click.option(
        "--group-size",
        type=int,
        default=128,
        help=f"Input channels that share a scale: {', '.join(map(str, GROUP_SIZES))}; -1 is a whole row.",
    ),
    click.option("--bits", type=int, default=4, help="Bits a weight; AWQ checkpoints hold 4."),
    click.option("--rounding", type=click.Choice(ROUNDINGS), help="How codes are chosen.  [default: gptq]"),
    click.option(
        "--max-flip-percent",
        type=click.FloatRange(0, 1),
        metavar="F",
        default=0.01,
        help="Of --rounding heuristic: most flips an output, as a fraction of its inputs.",
    ),
    click.option(
        "--knee-tolerance",
        type=float,
        metavar="F",
        default=0.0,
        help="Of --rounding heuristic: protect more outlier channels.",
    ),
    click.option(
        "--correct-inputs",
        type=float,
        metavar="F",
        help="Make up for this share of the drift from earlier layers' rounding. [default: 0.5 with gptq, else 0]",
    ),
    click.option(
        "--correct-bias/--no-correct-bias", help="Let biases absorb the mean rounding error of their linears."
    ),
    click.option(
        "--no-scale",
        is_flag=True,
        help="Do not search scales. Switches clip and gptq off too, unless --clip or --rounding is given.",
    ),
    click.option(
        "--clip", type=click.Choice(CLIPS), help="How the range of a group is searched.  [default: asymmetric]"
    ),
    click.option("--no-clip", is_flag=True, help="The same as --clip none."),
    click.option(
        "--component",
        "components",
        type=Components(),
        multiple=True,
        help="Keep or quantize one component, against its plugin's policy: vision=keep, vision=4bit. Repeatable.",
    ),
    click.option(
        "--keep",
        metavar="NAME",
        multiple=True,
        help="Linears whose full name contains NAME stay as they are. Repeatable.",
    ),
    click.option("--lm-head", is_flag=True, help="Quantize the output head too. Few engines load that."),
    click.option(
        "--lm-head-chunks",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Of --lm-head: work it in about N row chunks; 0 goes by its size.",
    ),
)
samples_option = click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", default=128, help="Calibration samples."
)
_CALIBRATION: tuple[Decorator, ...] = (
    samples_option,
    click.option("--seq-len", type=click.IntRange(min=1), metavar="N", default=512, help="Tokens in each sample."),
)


def weight_options(command: Any) -> Any:
    """What to do with the weights, and how much to calibrate on; `make_config` takes all but `samples`, `seq_len`."""
    for option in reversed(_CALIBRATION):
        command = option(command)
    return config_options(command)


def config_options(command: Any) -> Any:
    """What to do with the weights; `make_config` takes them."""
    for option in reversed(_WEIGHTS):
        command = option(command)
    return command


def given_options(ctx: click.Context, leave_out: Sequence[str] = ("as_json",)) -> list[str]:
    """The options that were typed, to be typed again."""
    words: list[str] = []
    for param in ctx.command.params:
        typed = ctx.get_parameter_source(param.name or "") is click.core.ParameterSource.COMMANDLINE
        if typed and isinstance(param, click.Option) and param.name not in leave_out:
            value = ctx.params[param.name or ""]
            for one in value if param.multiple else (value,):
                text = "=".join(one) if isinstance(one, tuple) else str(one)
                words += param.opts[:1] if param.is_flag else [param.opts[0], text]
    return words


def from_recipe(name: str) -> bool:
    """Whether the value of an option was read from a recipe, over which everything typed wins."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(name) is click.core.ParameterSource.DEFAULT_MAP


def make_config(
    *,
    group_size: int,
    bits: int,
    rounding: str | None,
    max_flip_percent: float = 0.01,
    knee_tolerance: float = 0.0,
    correct_inputs: float | None = None,
    correct_bias: bool = False,
    no_scale: bool,
    clip: str | None,
    no_clip: bool,
    components: Sequence[tuple[str, str]],
    keep: Sequence[str] = (),
    lm_head: bool = False,
    lm_head_chunks: int = 0,
    seed: int = 0,
) -> QuantConfig:
    """The configuration that options ask for.

    `--no-scale` alone is round-to-nearest, which needs no calibration data; clipping without scales is possible, and
    has to be asked for by name.

    Raises:
        ConfigError: a value this format cannot hold.
        click.UsageError: options that contradict one another.
    """
    if no_clip and clip not in (None, "none") and not from_recipe("clip"):
        raise click.UsageError(f"--no-clip and --clip {clip} contradict one another")
    chosen: dict[str, str] = {}
    for name, choice in components:
        if chosen.setdefault(name, choice) != choice:
            raise click.UsageError(f"--component says both {name}={chosen[name]} and {name}={choice}")
    return QuantConfig(
        bits=bits,
        group_size=group_size,
        scale=not no_scale,
        clip="none" if no_clip else clip or ("none" if no_scale else "asymmetric"),
        rounding=rounding or "",
        max_flip_percent=max_flip_percent,
        knee_tolerance=knee_tolerance,
        correct_inputs=correct_inputs,
        correct_bias=correct_bias,
        components=chosen,
        modules_to_not_convert=tuple(keep),
        lm_head=lm_head,
        lm_head_chunks=lm_head_chunks,
        seed=seed,
    )
