"""Progress of long work: a live bar where a person watches, plain lines in a log, JSON lines for a program.

Bars and lines go to stderr, JSON to stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from awq_core.cli.allocation_text import allocation_text
from awq_core.cli.output import duration, note, print_json_line

if TYPE_CHECKING:
    from awq_core.api import Phase
    from awq_core.mixed import Allocation
    from awq_core.quantization.engine import BlockDone
    from awq_core.quantization.sensitivity import Sensing

    Event = Phase | BlockDone | Sensing | Allocation
    Events = Callable[[Event], None]
    Windows = Callable[[int, int | None], None]
    Runs = Callable[[int, int, float | None], None]


def watched() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr.isatty()


class Pace:
    """Seconds a block so far, and from them the time left."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def left(self, event: BlockDone) -> float:
        """Seconds until the last block, counting `event` as the newest."""
        self.seconds += event.seconds
        return self.seconds / event.done * (event.total - event.done)


def loss_text(event: BlockDone) -> str:
    """Output error of the block, rounded to nearest and as it was quantized; empty without calibration."""
    if event.loss is None or event.loss_rtn is None:
        return ""
    change = f" ({event.loss / event.loss_rtn - 1:+.0%})" if event.loss_rtn else ""
    return f"error {event.loss_rtn:.3g} -> {event.loss:.3g}{change}"


def memory_text(event: BlockDone) -> str:
    """Memory in use when the block was done: "1.2 GB in use"."""
    from awq_core.sizes import size_text

    return f"{size_text(event.memory_bytes)} in use"


def block_text(event: BlockDone, left: float) -> str:
    """One line of a log."""
    parts = [f"block {event.done}/{event.total}", event.path, duration(event.seconds)]
    parts += [f"{duration(left)} left"] if event.done < event.total else []
    parts += [loss_text(event)] if event.loss is not None else []
    return "  ".join([*parts, memory_text(event)])


def sensing_left(event: Sensing) -> float:
    """Seconds until all sensitivities are known."""
    return event.seconds / event.share * (1 - event.share)


def sensing_text(event: Sensing) -> str:
    """ "sensitivity 40%  12 s left"."""
    left = f"  {duration(sensing_left(event))} left" if event.share < 1 else ""
    return f"sensitivity {event.share:.0%}{left}"


@contextmanager
def quantizing(as_json: bool, indent: str = "") -> Iterator[Events]:
    """A receiver for the events of `awq_core.quantize`; `indent` goes before each line."""
    if as_json:
        yield _json_lines()
    elif watched():
        with _bar(indent) as events:
            yield events
    else:
        yield _lines(indent)


def _json_lines() -> Events:
    from dataclasses import asdict

    from awq_core.api import Phase
    from awq_core.mixed import Allocation
    from awq_core.quantization.sensitivity import Sensing

    pace = Pace()

    def receive(event: Event) -> None:
        if isinstance(event, Phase):
            print_json_line({"event": "phase", **asdict(event)})
        elif isinstance(event, Sensing):
            print_json_line({"event": "sensitivity", **asdict(event), "seconds_left": round(sensing_left(event), 2)})
        elif isinstance(event, Allocation):
            print_json_line({"event": "allocation", **event.to_dict()})
        else:
            print_json_line({"event": "block", **asdict(event), "seconds_left": round(pace.left(event), 2)})

    return receive


def _lines(indent: str) -> Events:
    from awq_core.api import Phase
    from awq_core.mixed import Allocation
    from awq_core.quantization.sensitivity import Sensing

    pace = Pace()

    def receive(event: Event) -> None:
        if isinstance(event, Allocation):
            lines = allocation_text(event)
        elif isinstance(event, Sensing):
            lines = [sensing_text(event)]
        else:
            lines = [event.text if isinstance(event, Phase) else block_text(event, pace.left(event))]
        for line in lines:
            note(indent + line)

    return receive


@contextmanager
def _bar(indent: str) -> Iterator[Events]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from awq_core.api import Phase
    from awq_core.mixed import Allocation
    from awq_core.quantization.sensitivity import Sensing

    pace = Pace()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[detail]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        sensing = progress.add_task(f"{indent}sensitivity", total=1.0, detail="", visible=False)
        task = progress.add_task(f"{indent}blocks", total=None, detail="", visible=False)

        def receive(event: Event) -> None:
            if isinstance(event, (Phase, Allocation)):
                for line in [event.text] if isinstance(event, Phase) else allocation_text(event):
                    progress.console.print(indent + line, markup=False, highlight=False)
                return
            if isinstance(event, Sensing):
                detail = f"{duration(sensing_left(event))} left"
                progress.update(sensing, completed=event.share, detail=detail, visible=event.share < 1)
                return
            left = pace.left(event)
            parts = [f"{pace.seconds / event.done:.1f} s a block"]
            parts += [f"{duration(left)} left"] if event.done < event.total else []
            parts += [loss_text(event)] if event.loss is not None else []
            parts += [memory_text(event)]
            progress.update(task, completed=event.done, total=event.total, detail=", ".join(parts), visible=True)

        yield receive


@contextmanager
def measuring(label: str, as_json: bool) -> Iterator[Windows | None]:
    """A receiver for (windows done, windows in all): a bar that vanishes when done; None where nobody watches."""
    if as_json or not watched():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def running(label: str, as_json: bool) -> Iterator[Runs | None]:
    """A receiver for (runs done, runs in all, seconds left or None): a bar, in a log a line every ten seconds."""
    if as_json:
        yield None
    elif watched():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(label, total=None, left="")
            yield lambda done, total, left: progress.update(task, completed=done, total=total, left=left_text(left))
    else:
        said = time.monotonic()

        def receive(done: int, total: int, left: float | None) -> None:
            nonlocal said
            if time.monotonic() - said >= 10:
                said = time.monotonic()
                note(f"{label} {done}/{total}  {left_text(left)}")

        yield receive


def left_text(left: float | None) -> str:
    """ "12 s left"; "warming up" where nobody can know yet."""
    return "warming up" if left is None else f"{duration(max(0.0, left))} left"
