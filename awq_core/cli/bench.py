"""`awq bench`: how fast a model answers and writes, and how much memory it takes; alone or beside its original."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from awq_core.cli.options import device_option, json_option, plugin_option, trust_option
from awq_core.cli.output import duration, note, print_json
from awq_core.errors import ConfigError


class Counts(click.ParamType):
    """`1,4`: whole numbers above zero."""

    name = "N,N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is not a list of numbers, such as 1,4", param, ctx)
        return tuple(dict.fromkeys(map(int, words)))


@click.command(
    epilog="""\b
Examples:
  awq bench DIR
  awq bench DIR --against MODEL --batch 1,4 --context 128,1024 --new 64
  awq bench DIR --against MODEL --threads 1 --json
  awq bench DIR --against MODEL --plot speed.svg
  awq bench DIR --against MODEL --kernel int4pack
\b
Prompts are random tokens; the model writes greedily and no end token stops it.
With --against both models run in turn, and the ratio is that of the same round.
"""
)
@click.argument("model", metavar="DIR")
@click.option("--against", metavar="ORIGINAL", help="The unquantized model: folder or hub name.")
@click.option("--batch", "batches", type=Counts(), default="1,4", help="Batch sizes.")
@click.option("--context", "contexts", type=Counts(), default="128,1024", help="Tokens of the prompt.")
@click.option("--new", "new_tokens", type=click.IntRange(min=2), metavar="N", default=64, help="Tokens to write.")
@click.option("--rounds", type=click.IntRange(min=1), metavar="N", default=3, help="Runs of each; the median counts.")
@click.option("--seed", type=int, default=0, help="Of the prompts.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: torch's choice]")
@click.option("--kernel", metavar="NAME", help="Run DIR's 4-bit linears on this one, of those `awq kernels` lists.")
@click.option("--fuse", is_flag=True, help="Fuse what can be fused in DIR.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw the rates.")
@device_option
@plugin_option
@trust_option
@json_option
def bench(
    model: str,
    against: str | None,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    seed: int,
    threads: int | None,
    kernel: str | None,
    fuse: bool,
    plot: Path | None,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Time to first token, prefill and decode rates and memory of the model in DIR, quantized or not."""
    if plot is not None:
        from awq_core.cli.bench_plot import drawing  # before anything is measured: it may be missing

        draw = drawing(plot)
    import torch

    from awq_core.cli.models import open_model
    from awq_core.cli.progress import running
    from awq_core.evaluation.speed import measure_speed

    if threads is not None:
        torch.set_num_threads(threads)
    settings: dict[str, Any] = {"device": device, "plugin": plugin, "trust_remote_code": trust_remote_code}
    with forced(kernel):
        mine = open_model(model, fuse=fuse, **settings)
    kernels = kernels_of(mine)
    if kernel is not None and not kernels:
        raise ConfigError(f"--kernel {kernel}: {model} has no 4-bit linears", hint="leave --kernel out")
    networks = [mine] if against is None else [mine, open_model(against, **settings)]
    with running("runs", as_json) as progress:
        points = measure_speed(
            networks,
            batches=batches,
            contexts=contexts,
            new_tokens=new_tokens,
            rounds=rounds,
            seed=seed,
            progress=progress,
        )
    result = {
        "model": model,
        "against": against,
        "device": str(mine.device),
        "threads": torch.get_num_threads(),
        "dtypes": [str(one.dtype).removeprefix("torch.") for one in networks],
        "kernels": kernels,
        "fused": fuse,
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "seed": seed,
        "points": [point.to_dict() for point in points],
    }
    if plot is not None:
        draw(result)
        note(f"plot: {plot}")
    if as_json:
        print_json(result)
        return
    for line in table(result):
        click.echo(line)


@contextmanager
def forced(kernel: str | None) -> Iterator[None]:
    """`AWQ_KERNEL` for the model that is loaded here, and as it was for the next."""
    before = os.environ.get("AWQ_KERNEL")
    if kernel is not None:
        os.environ["AWQ_KERNEL"] = kernel
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("AWQ_KERNEL", None)
        else:
            os.environ["AWQ_KERNEL"] = before


def kernels_of(model: Any) -> dict[str, int]:
    """Kernels and how many linears run on each."""
    from awq_core.runtime.linear import QuantLinear

    return dict(Counter(module.backend for module in model.modules() if isinstance(module, QuantLinear)))


def table(result: dict[str, Any]) -> Iterator[str]:
    """The lines of the command."""
    from awq_core.sizes import size_text

    kernels = ", ".join(f"{count} linears on kernel {name}" for name, count in result["kernels"].items())
    dtypes = " against ".join(result["dtypes"])
    where = f"{result['device']}, {result['threads']} threads"
    yield ", ".join(filter(None, [dtypes, kernels, "fused" if result["fused"] else "", where]))
    yield f"{result['new_tokens']} new tokens, median of {result['rounds']} rounds; rates are tokens a second"
    rows: list[tuple[str, ...]] = [("batch", "context", "", "first token", "prefill", "decode", "memory")]
    names = [result["model"], result["against"]]
    for point in result["points"]:
        shape = (str(point["batch"]), str(point["context"]))
        for name, speed in zip(names, point["speeds"], strict=False):
            rates = (f"{speed[f'{phase}_tokens_per_second']:.1f}" for phase in ("prefill", "decode"))
            label = Path(name).name or name
            rows.append(
                (*shape, label, first_token(speed["first_token_seconds"]), *rates, size_text(speed["memory_bytes"]))
            )
            shape = ("", "")
        if point["ratio"]:
            ratio = {name: f"{value:.2f}x" for name, value in point["ratio"].items()}
            rows.append((*shape, "ratio", ratio["prefill"], ratio["prefill"], ratio["decode"], ratio["memory"]))
    yield from aligned(rows)


def first_token(seconds: float) -> str:
    """ "127 ms", "12 s"."""
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else duration(seconds)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns under one another: the third, a name, to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column == 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
