"""One run of one toolkit: what the process is told, and the seconds it reports."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """Read from a JSON file by `Job.read`, written there by `benchmarks/quantize.py`.

    Attributes:
        source: the model, a folder.
        out: folder for the result.
        tokens: file with the calibration windows.
        report: file that the times go to, rewritten after each phase, so that a killed run leaves what it had.
        group_size, threads: as on the command line.
        options: what sets this run apart from others of the same toolkit.
    """

    source: Path
    out: Path
    tokens: Path
    report: Path
    group_size: int
    threads: int
    options: dict[str, Any]
    reported: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, distribution: str) -> Job:
        """The job named on the command line; notes the version of `distribution`, and sets torch's threads."""
        values = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        job = cls(**values | {name: Path(values[name]) for name in ("source", "out", "tokens", "report")})
        import torch

        torch.set_num_threads(job.threads)
        job.note(version=version(distribution), dtype="bf16")
        return job

    def write(self, path: Path) -> None:
        values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        path.write_text(json.dumps(values), encoding="utf-8")

    def windows(self) -> list[list[int]]:
        """Calibration windows, equally long lists of token ids."""
        windows: list[list[int]] = json.loads(self.tokens.read_text(encoding="utf-8"))["calibration"]
        return windows

    def note(self, **values: Any) -> None:
        self.reported |= values
        self.report.write_text(json.dumps(self.reported), encoding="utf-8")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times "load", "quantize" or "save": seconds on the clock, and of all cores together."""
        clock, cores = time.perf_counter(), sum(os.times()[:4])
        yield
        self.note(**{name: time.perf_counter() - clock, f"{name}_cpu": sum(os.times()[:4]) - cores})
