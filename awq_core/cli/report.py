"""`awq report`: the page and the model card of a run, with what evaluations found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from awq_core.cli.options import device_option, json_option, plugin_option, split_option, text_option, trust_option
from awq_core.cli.output import command_line, note, print_json

if TYPE_CHECKING:
    from awq_core.report import Cost

# Options that mean nothing where no model is run.
RUNNING = ("source", "split", "max_windows")


@click.command(
    epilog="""\b
Examples:
  awq report DIR
  awq report DIR --against MODEL
  awq eval DIR --against MODEL --json > eval.json; awq report DIR --eval eval.json
  awq report DIR --out page.html
\b
DIR is the output of `awq quantize`, which writes the page once by itself. What
evaluations found is kept in DIR/awq_report.json and shown from then on; with
--out, the page alone is written and DIR stays as it is.
"""
)
@click.argument("folder", metavar="DIR")
@click.option("--out", metavar="FILE", help="Write the page here.  [default: DIR/report.html]")
@click.option(
    "--eval", "files", metavar="JSON", multiple=True, help="What `awq eval --json` printed, in a file. Repeatable."
)
@click.option("--against", metavar="ORIGINAL", help="The unquantized model: measure perplexity and KL divergence now.")
@text_option
@split_option
@click.option(
    "--max-windows",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of --against: stop after so many.  [default: as awq eval]",
)
@device_option
@plugin_option
@trust_option
@json_option
@click.pass_context
def report(
    ctx: click.Context,
    folder: str,
    out: str | None,
    files: tuple[str, ...],
    against: str | None,
    source: str | None,
    split: str | None,
    max_windows: int | None,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Write the HTML page of a run, and bring its model card up to date."""
    typed = next((param for param in ctx.command.params if param.name in RUNNING and ctx.params[param.name]), None)
    if against is None and typed is not None:
        raise click.UsageError(f"{typed.opts[0]} needs --against: without it no model is run")
    from awq_core.report import add_evaluations, plots, read_record, tables, update_card, write_page, write_record
    from awq_core.report.evaluations import named, read_evaluation

    plots.need()
    record = read_record(Path(folder))  # before any model is run
    found = [read_evaluation(Path(name)) for name in files]
    if against is not None:
        where: dict[str, Any] = {"device": device, "plugin": plugin, "trust_remote_code": trust_remote_code}
        found.append(named(measured(folder, against, source, split, max_windows, as_json=as_json, **where)))
    if out is None:
        record = write_record(Path(folder), evaluations=found)
        if not update_card(Path(folder), record):
            note("README.md has no section between the report's marks (any more), and stays as it is")
    else:
        record = add_evaluations(record, found)
    page = write_page(Path(folder), record, Path(out) if out else None)
    if as_json:
        figures = {what: [figure, remark] for what, figure, remark in tables.overview(record)}
        print_json({"page": page, "evaluations": len(record.evaluations), "figures": figures})
        return
    click.echo(f"{page}")
    if not record.evaluations:
        note(f"next: {command_line('awq', 'report', folder, '--against', 'ORIGINAL')}")


def measured(
    folder: str,
    against: str,
    source: str | None,
    split: str | None,
    max_windows: int | None,
    *,
    as_json: bool,
    device: str,
    plugin: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Perplexity of both models and their divergence, as a document in the form of `awq eval --json`."""
    from awq_core.cli import models
    from awq_core.cli.eval_options import Request
    from awq_core.cli.eval_run import Session, measure_text
    from awq_core.cli.eval_text import eval_text

    models.check_folders(folder, against)
    given = eval_text(source, split, None, max_windows)
    note(f"text: {given.name}")
    tokenizer = models.open_tokenizer(folder, trust_remote_code=trust_remote_code)
    request = Request(source=source, split=split, against=against, max_windows=max_windows)
    session = Session(folder, tokenizer, request, device, plugin, trust_remote_code, as_json)
    return {"model": folder, "text": given.name, **measure_text(session, given).values}


def report_of_run(folder: Path, cost: Cost | None) -> Path | None:
    """The page of a run that has just ended, its time and memory added to the record; None without matplotlib.

    The weights are safe by now: whatever fails here is a line, and no failure of the run.
    """
    from awq_core.errors import AwqError
    from awq_core.report import plots, write_page, write_record

    try:
        record = write_record(folder, cost=cost)
        if plots.available():
            return write_page(folder, record)
        note('no report.html without matplotlib: pip install "awq-core[plots]"')
    except AwqError as error:
        note(f"no report: {error}")
    return None
