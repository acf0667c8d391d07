"""The page: one HTML file with its style and its plots inside, for a browser with no network and no scripts.

A content security policy in the page forbids both, and the template escapes every value: names of models, linears and
texts are other people's. Only the SVG, which `plots.py` made, goes in as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jinja2

from awq_core.checkpoint.disk import disk_errors, write_whole
from awq_core.errors import OutputError
from awq_core.recipe import RECIPE
from awq_core.report import evaluations, plots, summary, tables
from awq_core.report.record import PAGE, Record
from awq_core.report.summary import Component
from awq_core.version import __version__

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST_RECIPE = 1 << 20
# Beyond these a heat map is no picture, and a table no reading.
MOST_EXPERTS, MOST_LINES = 1024, 2000


@dataclass(frozen=True, slots=True)
class Part:
    """What the page shows of one component: plots under headings of their own, and two tables."""

    name: str
    plots: dict[str, list[str]]
    blocks: tables.Table
    linears: tables.Table
    left_out: int


def write_page(folder: Path, record: Record, out: Path | None = None) -> Path:
    """Write the page of a run, whole or not at all; returns where it is.

    Args:
        folder: of the run; its recipe is shown.
        out: the file; `report.html` in the folder by default.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    path = out or folder / PAGE
    text = page_text(record, recipe=_recipe(folder))
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"cannot write to {path}", hint="name a file in a folder that is there")
    with disk_errors(path.parent):
        write_whole(path, text.encode())
    return path


def page_text(record: Record, *, recipe: str = "") -> str:
    """The HTML of the page; the same for the same record.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plots.need()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        record=record,
        overview=tables.overview(record),
        facts=tables.facts(record),
        evaluations=[(evaluations.title(one), evaluations.table(one)) for one in record.evaluations],
        parts=[_part(record, component) for component in summary.components(record)],
        experts=tables.experts(record),
        experts_plot=_experts(record),
        cost_plots=_cost(record),
        kept=tables.kept(record),
        recipe=recipe,
        version=__version__,
    )


def _part(record: Record, component: Component) -> Part:
    table = tables.linears(component)
    shown = tables.Table(table.head, table.rows[:MOST_LINES], table.note)
    left_out = len(table.rows) - len(shown.rows)
    return Part(component.name, _plots(record, component), tables.blocks(record, component), shown, left_out)


def _plots(record: Record, component: Component) -> dict[str, list[str]]:
    """SVG by the heading of the page that it stands under; none where a figure is the same everywhere."""
    names, found = summary.labels(component.blocks), {}
    if len(component.cells) == 1:
        return {}  # a picture of one figure

    def heat(title: str, value: summary.Value, *, top: float | None = None) -> list[str]:
        table = component.table(value)
        known = [index for index, row in enumerate(table) if any(one is not None for one in row)]
        values = {one for row in table for one in row if one is not None}
        if not values or values == {0.0}:
            return []
        kinds, rows = [component.kinds[index] for index in known], [table[index] for index in known]
        return [plots.heat(title, kinds, names, rows, top=top)]

    if record.calibrated:
        nearest, written = (
            [of(component.rows(block)) for block in component.blocks] for of in (summary.loss_rtn, summary.loss)
        )
        series = [("round to nearest", nearest), ("as written", written)]
        one = len(component.blocks) == 1
        found["error"] = [] if one else [plots.lines("Output error of a block's linears, summed", names, series)]
        found["error"] += heat("Error as a share of round-to-nearest's", summary.ratio, top=1.0)
        found["scales"] = heat("α, exponent of the activations", summary.alpha, top=1.0)
        found["scales"] += heat("β, exponent of the weights", summary.beta, top=1.0)
        found["ranges"] = heat("Groups whose range was narrowed, %", _percent(summary.clipped))
        found["codes"] = heat("Codes that are not the nearest, %", _percent(summary.flipped))
        found["codes"] += heat("Input channels whose codes might not flip, %", _percent(summary.masked))
    if len({row.bits for row in record.rows if row.component == component.name}) > 1:
        found["bits"] = heat("Stored bits a weight", summary.bits)
    return {heading: drawn for heading, drawn in found.items() if drawn}


def _percent(value: summary.Value) -> summary.Value:
    return lambda rows: None if (share := value(rows)) is None else 100 * share


def _experts(record: Record) -> str:
    """Tokens of every expert of every mixture; empty without one, or with more experts than a picture shows."""
    found = summary.mixtures(record)
    count = max((len(one.tokens) for one in found), default=0)
    if not 0 < count <= MOST_EXPERTS:
        return ""
    table = [[*one.tokens, *[None] * (count - len(one.tokens))] for one in found]
    kinds, names = [one.path for one in found], [str(index) for index in range(count)]
    return plots.heat("Calibration tokens sent to each expert", kinds, names, table, form="{:.0f}", across="expert")


def _cost(record: Record) -> list[str]:
    blocks = record.cost.blocks if record.cost else ()
    if not blocks:
        return []
    names = summary.labels([block.path for block in blocks])
    return [
        plots.bars("Time of each block", names, [block.seconds for block in blocks], "seconds"),
        plots.bars("Memory held after each block", names, [block.held / 1e9 for block in blocks], "GB"),
    ]


def _recipe(folder: Path) -> str:
    """The effective recipe that lies in the folder; empty where there is none."""
    try:
        with (folder / RECIPE).open(encoding="utf-8", errors="replace") as file:
            return file.read(LARGEST_RECIPE)
    except OSError:
        return ""
