"""`awq tune`: time the tiles of the Triton kernel on this GPU, and keep the best for models that are loaded later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from awq_core.cli.output import note, print_json
from awq_core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from awq_core.kernels.triton.tune import Best, Shape


class Sizes(click.ParamType):
    """N,K as two whole numbers."""

    name = "N,K"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        try:
            outputs, inputs = (int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not two numbers, outputs and inputs: 4096,14336", param, ctx)
        if outputs < 8 or outputs % 8 or inputs < 32 or inputs % 32:
            self.fail(f"{value!r}: outputs must be a multiple of 8, inputs one of 32", param, ctx)
        return outputs, inputs


@click.command(
    epilog="""\b
Examples:
  awq tune DIR
  awq tune DIR --fuse
  awq tune --shape 4096,14336 --shape 28672,4096 --group-size 128
"""
)
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--shape", "shapes", type=Sizes(), multiple=True, help="Outputs and inputs of a linear; may be repeated.")
@click.option("--group-size", default=128, metavar="G", help="Of --shape: 32, 64, 128, or -1 for whole rows.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16"]),
    help="Of activations; default: the model's, bfloat16 for --shape.",
)
@click.option("--fuse", is_flag=True, help="Tune for what load(fuse=True) runs: merged linears.")
@click.option("--device", default="cuda", help="The GPU to time on.")
@click.option("--json", "as_json", is_flag=True, help="Print data on stdout instead of text.")
def tune(
    folder: str | None,
    shapes: tuple[tuple[int, int], ...],
    group_size: int,
    dtype: str | None,
    fuse: bool,
    device: str,
    as_json: bool,
) -> None:
    """Time the choices of the Triton kernel on a GPU, for the linears of a quantized model or for given shapes.

    The best are kept in ~/.cache/awq and used whenever a model is loaded on such a GPU. Without them the shipped table
    is used: nothing is ever timed while a model runs. Takes minutes.
    """
    import torch

    from awq_core.devices import pick_device, pick_dtype
    from awq_core.kernels.cpu.build import BuildError
    from awq_core.kernels.triton import tuned
    from awq_core.kernels.triton.tune import Shape, cuda_timer
    from awq_core.kernels.triton.tune import tune as tune_shape

    if not folder and not shapes:
        raise ConfigError("nothing to tune for", hint="awq tune DIR, or --shape 4096,14336")
    if group_size not in (32, 64, 128, -1):
        raise ConfigError(f"group size {group_size} is not 32, 64, 128 or -1", hint="--group-size 128")
    if not torch.cuda.is_available():
        raise ConfigError("tiles are timed on a GPU, and this torch sees none", hint="run it where the model will run")
    target = pick_device(device)
    if target.type != "cuda":
        raise ConfigError(f"device={device!r}: tiles are of GPUs", hint="--device cuda, where there is one")
    wanted = dict.fromkeys(Shape(*size, max(0, group_size)) for size in shapes)
    compute = pick_dtype(dtype or "bfloat16")
    if folder:
        found, own = shapes_of(folder, device, fuse)
        wanted |= dict.fromkeys(found)
        compute = pick_dtype(dtype) if dtype else own
    try:
        path = tuned.path_for(device_name(target))
    except BuildError as error:
        raise ConfigError(str(error), hint="XDG_CACHE_HOME names another place") from error
    best: list[Best] = []
    for shape in wanted:
        note(f"{shape.outputs} x {shape.inputs}, groups of {shape.group or 'a row'} ...")
        made = tune_shape(shape, compute, target, cuda_timer)
        tuned.write(path, {one.key: one.tile for one in made})
        best += made
    if as_json:
        print_json({"file": str(path), "tiles": [_record(one) for one in best]})
        return
    for line in _table(best):
        click.echo(line)
    click.echo(f"kept in {path}")


def shapes_of(folder: str | Path, device: str, fuse: bool) -> tuple[list[Shape], torch.dtype]:
    """The shapes of a model's quantized linears as they run, and the dtype of their activations."""
    from awq_core import load
    from awq_core.kernels.triton.tune import Shape
    from awq_core.runtime.linear import QuantLinear

    linears = [one for one in load(folder, device=device, fuse=fuse).modules() if isinstance(one, QuantLinear)]
    if not linears:
        raise ConfigError(f"{folder}: no linear is quantized", hint="awq quantize MODEL --out DIR")
    found = dict.fromkeys(
        Shape(one.out_features, one.in_features, 0 if one.group_size == one.in_features else one.group_size)
        for one in linears
    )
    return list(found), linears[0].weight_dtype


def device_name(device: torch.device) -> str:
    """As the driver calls it."""
    import torch

    return torch.cuda.get_device_name(device)


def _record(one: Best) -> dict[str, Any]:
    from dataclasses import asdict

    _, _, outputs, inputs, group, tokens = one.key
    shape = {"outputs": outputs, "inputs": inputs, "group_size": group or -1, "tokens": tokens}
    return shape | {"tile": asdict(one.tile), "seconds": one.seconds, "default_seconds": one.default_seconds}


def _table(best: list[Best]) -> Iterator[str]:
    rows = [("outputs", "inputs", "tokens", "shipped, us", "tuned, us", "rows", "split", "warps", "stages")]
    for one in best:
        _, _, outputs, inputs, _, tokens = one.key
        times = (f"{1e6 * seconds:.1f}" for seconds in (one.default_seconds, one.seconds))
        work = (one.tile.rows, one.tile.split, one.tile.warps, one.tile.stages)
        rows.append(tuple(map(str, (outputs, inputs, tokens, *times, *work))))  # type: ignore[arg-type]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
