"""`awq export` and `awq import`: a quantized folder in another tool's format, and theirs in ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from awq_core.cli.options import json_option, plugin_option, trust_option
from awq_core.cli.output import command_line, note, plural, print_json
from awq_core.export.formats import EIGHT_BIT, FORMATS

if TYPE_CHECKING:
    from awq_core.export.formats import Exported

PICKLE = (
    "warning: model.pt is a pickle, a file that can run code when it is opened;"
    " open it with torch.load(path, weights_only=True)"
)
_TABLE = "\n".join(f"  {name:20}{text}" for name, (_, text) in FORMATS.items())

out_option = click.option("--out", required=True, metavar="DIR2", help="Folder to write; new or empty.")


@click.command(
    epilog=f"""\b
Formats:
{_TABLE}
\b
Examples:
  awq export DIR --to compressed-tensors --out DIR2
  awq export DIR --to compressed-tensors --eight-bit '*' --out DIR2
  awq export DIR --to gptq_v2 --out DIR2
  awq export DIR --to scaled-fp16 --out DIR2
  awq export DIR --to onnx --out DIR2
  awq export DIR --to gguf --out DIR2
\b
The codes, zero points and scales are the same in every format; scaled-fp16 and
gguf-fp16 multiply them out. --eight-bit rounds linears that were kept, and those
that engines fuse with them. DIR may be another toolkit's 4-bit folder too.
"""
)
@click.argument("folder", metavar="DIR")
@click.option("--to", type=click.Choice(list(FORMATS)), default="awq", help="The format.")
@click.option(
    "--eight-bit",
    metavar="NAME",
    multiple=True,
    help=f"Of {EIGHT_BIT}: kept linears whose full name contains NAME are stored in 8 bits; '*' is all of the blocks. "
    "Outside the blocks, the full name. Repeatable.",
)
@out_option
@plugin_option
@trust_option
@json_option
def export(
    folder: str,
    to: str,
    eight_bit: tuple[str, ...],
    out: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write a quantized folder as another tool reads it."""
    from awq_core.export.formats import export_checkpoint

    done = export_checkpoint(folder, out, to, eight_bit=eight_bit, plugin=plugin, trust_remote_code=trust_remote_code)
    if to == "torch":
        note(PICKLE)
    _tell(done, as_json)


@click.command(
    "import",
    epilog="""\b
Examples:
  awq import DIR --out DIR2
  awq import llm-compressor-model --out DIR2 --json
\b
Reads 4-bit folders of llm-compressor (compressed-tensors), GPTQModel, AutoGPTQ,
auto-round and AutoAWQ. What AWQ cannot hold exactly (act-order, other bits,
quantized activations) is refused in one line.
""",
)
@click.argument("folder", metavar="DIR")
@out_option
@plugin_option
@trust_option
@json_option
def import_(folder: str, out: str, plugin: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """Write another toolkit's 4-bit folder as AWQ, code for code."""
    from awq_core.export.formats import import_checkpoint

    _tell(import_checkpoint(folder, out, plugin=plugin, trust_remote_code=trust_remote_code), as_json)


def _tell(done: Exported, as_json: bool) -> None:
    for line in done.notes:
        note(f"note: {line}")
    if as_json:
        eight = {"eight_bit": done.eight_bit} if done.eight_bit else {}
        print_json({"out": done.out, "format": done.format, "linears": done.linears, **eight, "bytes": done.nbytes})
        return
    from awq_core.sizes import size_text

    kept = f", {plural(len(done.eight_bit), 'kept one')} in 8 bits" if done.eight_bit else ""
    size = size_text(done.nbytes)
    click.echo(f"{done.out}: {done.format}, {plural(done.linears, 'linear')} converted{kept}, {size}")
    if done.format == "awq":
        note(f"next: {command_line('awq', 'generate', done.out, '--prompt', 'def read_json(path):')}")
