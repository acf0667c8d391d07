"""The picture of `awq bench`: rates of each model at each batch size and context, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from awq_core.errors import ConfigError

GREY = "#808080"  # four to one against white and five to one against black
COLOURS = ("#3b82f6", "#e07b39")
PHASES = (("prefill_tokens_per_second", "prefill"), ("decode_tokens_per_second", "decode"))


def drawing(file: Path) -> Callable[[dict[str, Any]], None]:
    """A function that draws the command's result into `file`; the suffix chooses the format.

    Raises:
        ConfigError: matplotlib is not installed, the folder is not there, or matplotlib knows no such suffix.
    """
    try:
        import matplotlib
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib", hint='pip install "awq-core[plots]"') from error
    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in known:
        raise ConfigError(f"--plot {file}: no such format", hint=f"one of .{', .'.join(sorted(known))}")
    if not file.parent.is_dir():
        raise ConfigError(f"--plot {file}: no such folder", hint="make it first")

    def draw(result: dict[str, Any]) -> None:
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "awq", "font.size": 9}):
            figure = Figure(figsize=(9, 3.6), layout="constrained")
            for axes, (field, title) in zip(figure.subplots(1, 2), PHASES, strict=True):
                _bars(axes, result, field)
                axes.set_title(f"{title}, tokens a second", color=GREY)
            figure.savefig(file, transparent=True, metadata={"Date": None} if file.suffix == ".svg" else None)

    return draw


def _bars(axes: Any, result: dict[str, Any], field: str) -> None:
    """One group of bars a shape; above the first bar, how many times as fast it is as the second."""
    points = result["points"]
    names = [name for name in (result["model"], result["against"]) if name]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [group + (index - (len(names) - 1) / 2) * width for group in range(len(points))]
        heights = [point["speeds"][index][field] for point in points]
        bars = axes.bar(places, heights, width, color=COLOURS[index], label=Path(name).name or name)
        if index == 0 and len(names) == 2:
            labels = [f"{point['ratio'][field.partition('_')[0]]:.2f}x" for point in points]
            axes.bar_label(bars, labels, color=GREY)
    axes.set_xticks(range(len(points)), [f"{point['batch']} x {point['context']}" for point in points])
    axes.set_xlabel("batch x context", color=GREY)
    axes.tick_params(colors=GREY)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY)
