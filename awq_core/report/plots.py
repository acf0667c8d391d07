"""The plots of a report: SVG that stands inside the page.

matplotlib draws ink in one colour of its own, INK, which becomes `currentColor`: text, axes and frames have the colour
of the page's text, light or dark. Cells of a heat map carry their own colours. Nothing is rasterised, and what belongs
to a file of its own (document type, metadata, names of elements, namespaces) is left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from awq_core.errors import ConfigError

INK = "#010203"
COLOURS = ("#e07b39", "#3b82f6")  # three to one and more against white and against the page's dark
RC: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # names come from models
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 8.6  # inches
NUMBERED = 16  # columns of a heat map up to which its cells show their numbers
LEVELS = 32  # colours of a heat map; with more than 50 matplotlib would rasterise the bar


def available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def need() -> None:
    """Raises ConfigError where matplotlib is not installed."""
    if not available():
        raise ConfigError("a report needs matplotlib for its plots", hint='pip install "awq-core[plots]"')


def lines(title: str, names: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]) -> str:
    """Positive values by block, one line a series, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    with _figure(2.9) as (figure, done):
        axes = figure.subplots()
        for index, (name, values) in enumerate(series):
            heights = [value if value and value > 0 else float("nan") for value in values]
            axes.plot(range(len(names)), heights, marker="o", markersize=3.5, color=COLOURS[index], label=name)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", color=INK, alpha=0.15)
        axes.set_title(title)
        axes.set_xlabel("block")
        _ticks(axes, names)
        axes.legend(frameon=False)
    return done[0]


def bars(title: str, names: Sequence[str], values: Sequence[float], unit: str) -> str:
    """One bar a block."""
    with _figure(2.2) as (figure, done):
        axes = figure.subplots()
        axes.bar(range(len(names)), values, color=COLOURS[1])
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_xlabel("block")
        _ticks(axes, names)
    return done[0]


def heat(
    title: str,
    kinds: Sequence[str],
    names: Sequence[str],
    table: Sequence[Sequence[float | None]],
    *,
    top: float | None = None,
    form: str = "",
    across: str = "block",
) -> str:
    """A cell for each kind and block, from zero to `top`, or to the largest value; `form` is that of its number."""
    import numpy as np
    from matplotlib import colormaps

    values = np.array([[np.nan if one is None else one for one in row] for row in table], dtype=float)
    known = values[np.isfinite(values)]
    most = top if top is not None else float(known.max()) if known.size and known.max() > 0 else 1.0
    form = form or ("{:.2f}" if most < 10 else "{:.1f}" if most < 100 else "{:.0f}")
    colours = colormaps["viridis"].resampled(LEVELS)
    with _figure(1.0 + 0.27 * max(len(kinds), 2)) as (figure, done):
        axes = figure.subplots()
        mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colours, vmin=0, vmax=most, edgecolors="none")
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_yticks(np.arange(len(kinds)) + 0.5, [_short(kind) for kind in kinds])
        _ticks(axes, names, 0.5)
        if len(names) <= NUMBERED:
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    ink = "#000000" if value > 0.5 * most else "#ffffff"
                    place = {"ha": "center", "va": "center", "fontsize": 8}
                    axes.text(column + 0.5, row + 0.5, form.format(value), color=ink, **place)
        else:
            bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
            bar.outline.set_visible(False)
    return done[0]


def _ticks(axes: Any, names: Sequence[str], shift: float = 0.0) -> None:
    """Names below the axis, as many as there is room for."""
    step = max(1, -(-len(names) // 32))
    axes.set_xticks([index + shift for index in range(0, len(names), step)], [_short(one) for one in names[::step]])


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"...{name[-29:]}"


@contextmanager
def _figure(height: float) -> Iterator[tuple[Any, list[str]]]:
    """A figure to draw in, and a list that holds its SVG afterwards."""
    import matplotlib
    from matplotlib.figure import Figure

    done: list[str] = []
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure, done
        title = figure.axes[0].get_title(loc="left")
        buffer = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": title}):
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        done.append(_inline(buffer.getvalue()))


def _inline(svg: str) -> str:
    """The element alone, as wide as it is given room, in the page's colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, end, body = svg.partition(">")
    box = re.search(r'viewBox="[\d. ]+"', head)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace(INK, "currentColor")
    return f'<svg {box[0] if box else ""} role="img"{end}{body}'.strip()
