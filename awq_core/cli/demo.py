"""`awq demo`: the whole road on a small model, in two minutes on two CPU cores, with nothing to download.

the model -> calibration text -> quantized, rounded to nearest and by AWQ -> reloaded from disk -> a table
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from awq_core.cli.options import json_option
from awq_core.cli.output import command_line, duration, note, plural, print_json, weight_bytes

if TYPE_CHECKING:
    from awq_core.calibration import CalibrationData
    from awq_core.cli.demo_measure import Row

WINDOWS = 32
NEW_TOKENS = 48
SEQ_LEN = 512
CHARACTERS = 5  # a token of code is three or four
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@click.command(
    epilog="""\b
Examples:
  awq demo
  awq demo --group-size 32 --samples 64
  awq demo --json > demo.json
\b
The text comes from this Python's standard library, the model from this checkout.
Each quantized model stays in demo-output, for `awq generate` and `awq eval`.
"""
)
@click.option("--model", metavar="DIR", help="The model.  [default: examples/pycoder]")
@click.option("--out", default="demo-output", metavar="DIR", help="Folder of the results; earlier ones are replaced.")
@click.option("--group-size", "group_sizes", type=int, multiple=True, default=(128, 32), help="Group size. Repeatable.")
@click.option("--samples", type=click.IntRange(min=1), metavar="N", default=64, help="Calibration samples.")
@click.option("--windows", type=click.IntRange(min=1), metavar="N", default=WINDOWS, help="Windows to measure on.")
@json_option
def demo(model: str | None, out: str, group_sizes: Sequence[int], samples: int, windows: int, as_json: bool) -> None:
    """Quantize the example model in several ways, reload each from disk, and compare them."""
    started = time.perf_counter()
    from awq_core.cli import demo_data
    from awq_core.config import QuantConfig

    folder = demo_data.model_folder(model)
    held_out = demo_data.held_out_modules(folder)
    recipes = {}
    for size in dict.fromkeys(group_sizes):
        recipes[f"RTN g{size}"] = QuantConfig(group_size=size, scale=False, clip="none")
        recipes[f"AWQ g{size}"] = QuantConfig(group_size=size)
    folders = {name: Path(out) / name.lower().replace(" ", "-") for name in recipes}
    demo_data.clear_output(Path(out), [path.name for path in folders.values()])

    import awq_core
    from awq_core.cli.demo_measure import WINDOW, Remembering, measure
    from awq_core.cli.models import open_tokenizer

    plan = awq_core.plan(folder)
    tokenizer = open_tokenizer(folder)
    reference = Remembering(awq_core.load(folder))
    _step(1, f"the model: {folder}, {reference.model.num_parameters() / 1e6:.1f} M parameters")
    note(f"     plugin {plan.plugin} ({plan.dist} {plan.version}) owns it: family {plan.family}")
    quantized = sum(linear.quantize for linear in plan.linears)
    groups = sum(len(block.groups) for block in plan.blocks)
    note(f"     {plural(len(plan.blocks), 'block')}, {plural(quantized, 'linear')}, {plural(groups, 'scale group')}")

    _step(2, "calibration text: source of the Python standard library")
    data = calibration(tokenizer, held_out, samples, sample_length(reference))
    note(f"     {plural(data.samples, 'sample')}, {data.tokens} tokens; {len(held_out)} modules are left out")

    _step(3, f"quantizing to 4 bits in {plural(len(recipes), 'way')}: RTN rounds to nearest, AWQ looks at the text")
    for name, config in recipes.items():
        quantize(name, folder, folders[name], config, data, as_json)

    _step(4, f"measuring on held-out modules, each model reloaded from disk: {windows} windows of {WINDOW} tokens")
    text = "\n\n".join(demo_data.held_out_texts(held_out, windows * WINDOW * CHARACTERS))
    settings: dict[str, Any] = {"windows": windows, "new_tokens": NEW_TOKENS}
    dtype = str(reference.model.dtype).removeprefix("torch.")
    rows = [measure(DTYPES.get(dtype, dtype), folder, reference, None, tokenizer, text, **settings)]
    note(f"     {rows[0].name}")
    for name, path in folders.items():
        loaded = Remembering(awq_core.load(path))
        rows.append(measure(name, path, loaded, reference, tokenizer, text, **settings))
        note(f"     {name}")

    seconds = time.perf_counter() - started
    _step(5, f"done in {duration(seconds)}")
    if as_json:
        table = [asdict(row) for row in rows]
        print_json({"model": folder, "held_out": held_out, "rows": table, "seconds": round(seconds, 1)})
        return
    show(rows)
    best = min(rows[1:], key=lambda row: row.kl_mean or 0.0)
    note(f"\nnext: {command_line('awq', 'generate', best.folder, '--prompt', 'def main():')}")
    note(f"      {command_line('awq', 'plan', folder)}")


def _step(number: int, text: str) -> None:
    note(click.style(f"{number}/5  {text}", bold=True))


def sample_length(model: Any) -> int:
    """Tokens a calibration sample: `SEQ_LEN`, or the model's context where that is shorter."""
    from awq_core.evaluation.perplexity import fitting_window

    return fitting_window(SEQ_LEN, model)


def calibration(tokenizer: Any, held_out: Sequence[str], samples: int, seq_len: int) -> CalibrationData:
    """Samples of the standard library without the held-out modules, the same for every recipe."""
    from awq_core.calibration import standard_library, text_batches

    name = "Python standard library source without the held-out modules"
    texts = standard_library(exclude=held_out)
    return text_batches(texts, tokenizer, n_samples=samples, seq_len=seq_len, description=name)


def quantize(name: str, folder: Path, out: Path, config: Any, data: CalibrationData, as_json: bool) -> None:
    """One recipe, with its blocks as they finish where calibration makes them slow."""
    import awq_core
    from awq_core.cli.progress import quantizing
    from awq_core.cli.quantize import total_loss
    from awq_core.sizes import size_text

    watched = config.needs_calibration and not as_json
    with quantizing(False, indent="       ") if watched else nullcontext() as progress:
        result = awq_core.quantize(folder, out, config=config, calibration=data, progress=progress)
    rtn, loss = total_loss(result, "loss_rtn"), total_loss(result, "loss")
    error = f", output error {loss / rtn:.0%} of RTN's" if rtn and loss is not None else ""
    note(f"     {name}: {out}, {size_text(weight_bytes(out))}, {duration(result.seconds)}{error}")


def show(rows: Sequence[Row]) -> None:
    """The table, and a completion from each model."""
    from rich.console import Console
    from rich.table import Table

    from awq_core.cli.demo_measure import PROMPT
    from awq_core.sizes import size_text

    table = Table()
    for title in ("", "perplexity", "KL to original", "top-1", "size", "tokens/s"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for row in rows:
        error = "" if row.kl_stderr is None or row.kl_stderr != row.kl_stderr else f" ± {row.kl_stderr:.4f}"
        table.add_row(
            row.name,
            f"{row.perplexity:.3f}",
            "" if row.kl_mean is None else f"{row.kl_mean:.4f}{error}",
            "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
            size_text(row.bytes),
            f"{row.tokens_per_second:.0f}",
        )
    Console().print(table)
    click.echo("KL: nats a token, ± standard error. top-1: how often the likeliest token is the original's.")
    click.echo(f"\n{PROMPT!r}, continued")
    for row in rows:
        click.echo(f"\n{row.name}")
        for line in row.completion.rstrip().splitlines():
            click.echo(f"    {line}".rstrip())
