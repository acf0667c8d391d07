"""Killed at every step and at random moments, or out of disk there: nothing committed is lost, and the bytes of the
result are those of a run that nothing happened to. `killed_writer.py` is the victim."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PARTIAL = ".awq-partial"
KILLED = -signal.SIGKILL


@dataclass
class Outcome:
    status: int
    lines: list[str]

    @property
    def found(self) -> int | None:
        """How many units the process found; None if it did not come to that."""
        return next((int(line.split()[1]) for line in self.lines if line.startswith("found")), None)

    @property
    def committed(self) -> int:
        """How many units were safe, as far as the process said."""
        return max((int(line.split()[1]) for line in self.lines if line.startswith("committed")), default=0)


class Victim:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, out: Path, **how: Any) -> Outcome:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"out": str(out), **how}), file=self.process.stdin, flush=True)
        lines = []
        while not (line := self.process.stdout.readline()).startswith("status"):
            assert line and not line.startswith("bug"), [*lines, line]
            lines.append(line.rstrip("\n"))
        return Outcome(int(line.split()[1]), lines)


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    script = Path(__file__).with_name("killed_writer.py")
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Victim(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="module")
def undisturbed(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert victim.run(out).status == 0
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_left(out: Path, expected: dict[str, bytes]) -> None:
    """What a killed run leaves: the whole model, or none, with or without the partial folder."""
    if (out / "config.json").exists():
        left = content(out)
        assert {name: data for name, data in left.items() if not name.startswith(PARTIAL)} == expected


def run_to_the_end(victim: Victim, out: Path, committed: int, expected: dict[str, bytes]) -> None:
    arrived = (out / "config.json").exists()
    outcome = victim.run(out)
    if outcome.status:
        # It was killed while it cleaned up behind itself: a finished model, refused like any other.
        assert arrived and "is not empty" in outcome.lines[-1]
    elif "complete" not in outcome.lines:
        assert outcome.found is not None and outcome.found >= committed and not arrived
    assert content(out) == expected


def test_what_a_run_makes(undisturbed: dict[str, bytes]) -> None:
    shards = [name for name in undisturbed if name.endswith(".safetensors")]
    assert len(shards) == 6 and "sub/merges.txt" in undisturbed, "unit 0, unit 2 in three, unit 3, and all the rest"


def test_killed_at_every_step(victim: Victim, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for step in range(1, 10_000):
        out = tmp_path / str(step)
        outcome = victim.run(out, kill_at=step)
        if outcome.status == 0:
            break
        assert outcome.status == KILLED
        check_left(out, undisturbed)
        run_to_the_end(victim, out, outcome.committed, undisturbed)
    assert step > 100, "the steps are not counted"


def test_killed_again_and_again(victim: Victim, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    """The steps of going on, of finishing a second time and of cleaning up are killed too."""
    rng, kills = random.Random(0), 0
    for number in range(30):
        out, committed = tmp_path / str(number), 0
        for _ in range(100):
            outcome = victim.run(out, kill_at=rng.randint(1, 140))
            assert outcome.found is None or outcome.found >= committed
            committed = max(committed, outcome.committed)
            if outcome.status != KILLED:
                break
            kills += 1
            check_left(out, undisturbed)
        assert outcome.status == 0 or "is not empty" in outcome.lines[-1]
        assert content(out) == undisturbed
    assert kills > 50


def test_killed_at_any_moment(victim: Victim, tmp_path: Path) -> None:
    """By the clock, so also inside a write."""
    assert victim.run(tmp_path / "whole", units=60).status == 0
    expected = content(tmp_path / "whole")
    rng, kills, number, committed = random.Random(1), 0, 0, 0
    while kills < 40:
        out = tmp_path / str(number)
        outcome = victim.run(out, units=60, kill_after=rng.uniform(0.001, 0.05))
        assert outcome.found is None or outcome.found >= committed
        if outcome.status == KILLED:
            kills += 1
            check_left(out, expected)
            committed = max(committed, outcome.committed)
        else:
            assert outcome.status == 0 or "is not empty" in outcome.lines[-1]
            assert content(out) == expected
            number, committed = number + 1, 0
    if content(tmp_path / str(number)) != expected:
        assert victim.run(tmp_path / str(number), units=60).status == 0
    assert content(tmp_path / str(number)) == expected


def test_the_disk_is_full_from_any_step_on(victim: Victim, undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    for step in range(1, 10_000):
        out = tmp_path / str(step)
        outcome = victim.run(out, full_at=step)
        if outcome.status == 0:
            break
        assert outcome.status == 1 and "disk full writing to" in outcome.lines[-1]
        committed = outcome.committed
        resumes = "free space and run the same command again: it resumes where it stopped" in outcome.lines[-1]
        assert resumes == out.exists() and resumes >= (committed > 0)
        left = {name for name in content(out) if not re.search(r"/(lock|journal\.jsonl|finishing\.json)$", name)}
        assert all("/parts/" in name or "/stage/" in name or name in undisturbed for name in left), "no scraps"
        run_to_the_end(victim, out, committed, undisturbed)
    assert step > 60, "the steps are not counted"
