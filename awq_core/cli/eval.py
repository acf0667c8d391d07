"""`awq eval`: perplexity on a text and, beside the original, what quantization changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from awq_core.cli.options import (
    device_option,
    json_option,
    plugin_option,
    split_option,
    text_option,
    trust_option,
)
from awq_core.cli.output import note, print_json

BUILTIN_WINDOWS = 16
# More characters than any tokenizer puts into a token on average.
CHARACTERS = 8
DIVERGENCE_WINDOW = 512


@dataclass(frozen=True)
class EvalText:
    """A text and what to call it."""

    text: str
    name: str
    windows: int | None


@click.command(
    "eval",
    epilog="""\b
Examples:
  awq eval DIR
  awq eval DIR --text notes.txt --against MODEL
  awq eval DIR --text Salesforce/wikitext:wikitext-2-raw-v1 --split test
\b
The last is WikiText-2 perplexity by the protocol of the GPTQ and AWQ papers.
Without --text: source of the Python standard library, 16 windows unless
--max-windows is given; good for comparing a model with its original.
""",
)
@click.argument("model", metavar="DIR")
@text_option
@split_option
@click.option("--against", metavar="ORIGINAL", help="The unquantized model: folder or hub name.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens a window.  [default: 2048, or the model's context; 512 for the divergence]",
)
@click.option(
    "--max-windows", type=click.IntRange(min=1), metavar="N", help="Stop after so many windows.  [default: all]"
)
@device_option
@plugin_option
@trust_option
@json_option
def evaluate(
    model: str,
    source: str | None,
    split: str | None,
    against: str | None,
    window: int | None,
    max_windows: int | None,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Perplexity of the model in DIR, quantized or not; with --against, its distance from the original."""
    from awq_core.cli import models
    from awq_core.cli.progress import measuring
    from awq_core.evaluation import divergence, perplexity

    given = eval_text(source, split, window, max_windows)
    note(f"text: {given.name}")
    tokenizer = models.open_tokenizer(model, trust_remote_code=trust_remote_code)
    candidate = models.open_model(model, device=device, plugin=plugin, trust_remote_code=trust_remote_code)

    def measure(network: Any, name: str) -> Any:
        with measuring(f"perplexity of {name}", as_json) as progress:
            return perplexity(
                network, tokenizer, given.text, window=window, max_windows=given.windows, progress=progress
            )

    mine = measure(candidate, model)
    result: dict[str, Any] = {"model": model, "text": given.name, "perplexity": mine.to_dict(), "against": None}
    if against is not None:
        reference = models.open_model(against, device=device, plugin=plugin, trust_remote_code=trust_remote_code)
        theirs = measure(reference, against)
        length = window or min(DIVERGENCE_WINDOW, mine.window)
        limit = None if given.windows is None else given.windows * max(1, mine.window // length)
        with measuring("divergence", as_json) as progress:
            apart = divergence(
                reference, candidate, tokenizer, given.text, window=length, max_windows=limit, progress=progress
            )
        result["against"] = {
            "model": against,
            "perplexity": theirs.to_dict(),
            "difference": mine.perplexity - theirs.perplexity,
            "divergence": apart.to_dict(),
        }
    if as_json:
        print_json(result)
    else:
        tell(result)


def eval_text(source: str | None, split: str | None, window: int | None, max_windows: int | None) -> EvalText:
    """The text to measure on; without a source, standard-library modules that calibration's default reads last.

    Raises:
        CalibrationError: the source cannot be read.
        click.UsageError: a split of what has none.
    """
    from awq_core.calibration import describe_source, read_text, standard_library
    from awq_core.calibration.sources import local_path
    from awq_core.evaluation.perplexity import STANDARD_WINDOW

    if split is not None and (source is None or local_path(source) is not None):
        raise click.UsageError("--split is for hub datasets")
    if source is not None:
        name = describe_source(source) + (f", split {split}" if split else "")
        return EvalText(read_text(source, split=split), name, max_windows)
    windows = max_windows or BUILTIN_WINDOWS
    enough = windows * (window or STANDARD_WINDOW) * CHARACTERS
    pieces: list[str] = []
    for sample in reversed(list(standard_library())):
        if sum(map(len, pieces)) >= enough:
            break
        pieces.append(sample["text"])
    name = "Python standard library source (built-in default), the modules that calibration reads last"
    return EvalText("\n\n".join(pieces), name, windows)


def tell(result: dict[str, Any]) -> None:
    """The result for the eye."""
    mine, against = result["perplexity"], result["against"]
    click.echo(f"perplexity   {mine['perplexity']:.4f}")
    if against:
        theirs, apart = against["perplexity"]["perplexity"], against["divergence"]
        error = "" if apart["kl_stderr"] is None else f" ± {apart['kl_stderr']:.5f}"
        click.echo(f"original     {theirs:.4f}")
        click.echo(f"difference   {against['difference']:+.4f} ({mine['perplexity'] / theirs - 1:+.2%})")
        click.echo(f"KL           {apart['kl_mean']:.5f}{error} nats a token, median {apart['kl_median']:.5f}")
        click.echo(f"agreement    {apart['top1_agreement']:.2%} of likeliest tokens are the same")
    click.echo(f"protocol     {mine['protocol']}; {mine['tokens']} tokens predicted")
    if against:
        click.echo(f"             KL and agreement: {apart['windows']} windows of {apart['window']} tokens")
