"""`--recipe FILE`: every option of a command may come from a YAML file.

A recipe is turned into click's `default_map`, so an option that is typed wins over the recipe, and the recipe over the
default. Keys are the long options of `awq quantize`, and `model`; other commands take those they share.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from textwrap import shorten
from typing import Any

import click

from awq_core.cli.options import Components
from awq_core.cli.output import JSON
from awq_core.config import QuantConfig
from awq_core.errors import ConfigError

OWN = "recipe"  # the one option that is no setting
ELSEWHERE = {"modules_to_not_convert": "keep"}  # names too far from ours for a spelling mistake


def keys_of(command: click.Command) -> dict[str, click.Parameter]:
    """Key -> parameter: "group_size" for --group-size, "model" for the argument MODEL."""
    keys = {}
    for param in command.params:
        name = param.opts[0].removeprefix("--") if isinstance(param, click.Option) else str(param.name)
        keys[name.replace("-", "_")] = param
    keys.pop(OWN, None)
    return keys


def settings(path: Path, command: click.Command, ctx: click.Context) -> dict[str, Any]:
    """What a recipe says, by the names of the parameters of `command`, with the values their types make of the text.

    Raises:
        ConfigError: the file is no recipe, or has a key or value that `command` does not take; names file and key.
    """
    from awq_core.recipe import read_recipe

    keys = keys_of(command)
    result: dict[str, Any] = {}
    for key, value in read_recipe(path).items():
        if key not in keys:
            near = [ELSEWHERE[key]] if key in ELSEWHERE else difflib.get_close_matches(key, keys, n=1)
            every = shorten(", ".join(sorted(keys)), 300, placeholder=" ... (awq quantize --help)")
            hint = f"did you mean {near[0]!r}?" if near else f"known: {every}"
            raise ConfigError(f"{path}: unknown key {key!r}", hint=hint)
        if value is None:
            continue  # `calib:` with nothing behind it is the default
        param = keys[key]
        try:
            result[str(param.name)] = param.type_cast_value(ctx, _words(value, param))
        except click.BadParameter as error:
            hint = f"awq {command.name} --help says what it takes"
            raise ConfigError(f"{path}: {key}: {error.message.removesuffix('.')}", hint=hint) from error
    if result.pop("no_clip", False):
        clip = result.setdefault("clip", "none")
        if clip != "none":
            raise ConfigError(f"{path}: no_clip and clip: {clip} contradict one another", hint="keep one")
    try:
        QuantConfig.from_dict({key: result[key] for key in ("bits", "group_size") if key in result})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    return result


def _words(value: Any, param: click.Parameter) -> Any:
    """The value as it would be typed: one word, or a list of words where the option may be repeated."""
    many = isinstance(param, click.Option) and param.multiple
    if isinstance(param.type, Components) and isinstance(value, dict):
        value = [f"{name}={one if isinstance(one, str) else ''}" for name, one in value.items()]
    elif many and isinstance(value, str):
        value = [value]
    if many and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if not many and isinstance(value, str):
        return value
    kind = "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else "a tagged value"
    raise click.BadParameter(f"{kind} is not possible here")


def _take(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None or ctx.resilient_parsing:
        return value
    root = ctx.find_root()
    whole = root.command.get_command(root, "quantize") if isinstance(root.command, click.Group) else None
    found = settings(Path(value), whole or ctx.command, ctx)
    if found.get("as_json"):
        ctx.meta[JSON] = True
    ctx.default_map = found
    return value


recipe_option = click.option(
    "--recipe",
    metavar="FILE",
    is_eager=True,
    callback=_take,
    help="A YAML file with any of these options, such as the recipe.yaml beside quantized weights. What is typed wins.",
)
