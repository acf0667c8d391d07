"""A process with a time limit, and what the operating system knows about it afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL = 0.2


@dataclass(frozen=True)
class Usage:
    """Attributes: exit code, None if it was stopped at the limit; seconds; peak resident bytes."""

    code: int | None
    seconds: float
    peak_bytes: int


def watch(
    command: Sequence[str], *, folder: Path, environment: Mapping[str, str], log: Path, limit: float | None = None
) -> Usage:
    """Run `command` in `folder` with its output in `log`; after `limit` seconds stop it and whatever it started."""
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    stopped = False
    try:
        while True:
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - started
            if ended:
                break
            if limit is not None and seconds > limit and not stopped:
                os.killpg(process.pid, signal.SIGKILL)
                stopped = True
            time.sleep(POLL)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return Usage(None if stopped else process.returncode, seconds, used.ru_maxrss * 1024)
