"""Starting the others: the modules of this folder as processes, a toolkit's run among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.environments import Run
from peers.job import Job
from peers.process import watch

BENCHMARKS = Path(__file__).resolve().parents[1]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def child_environment(threads: int) -> dict[str, str]:
    """This one, with `threads` threads that do not spin while they wait, and no hub."""
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **quiet, "OMP_WAIT_POLICY": "PASSIVE"}


def module_command(python: str, module: str, argument: Path) -> list[str]:
    """Runs a module of `peers`. Its parent folder stays off the path: `kernels.py` there is not the package."""
    code = (
        "import runpy, sys, types\n"
        "package = sys.modules['peers'] = types.ModuleType('peers')\n"
        f"package.__path__ = [{str(BENCHMARKS / 'peers')!r}]\n"
        f"runpy.run_module('peers.{module}', None, '__main__')"
    )
    return [python, "-c", code, str(argument)]


def ask(
    module: str, wanted: dict[str, Any], work: Path, threads: int, python: Path = Path(sys.executable)
) -> dict[str, Any]:
    """What a module of `peers` prints, in its last line, when given `wanted`; run by `python`.

    Raises:
        subprocess.CalledProcessError: the process failed; its words are on stderr.
    """
    question = work / f"{module}.json"
    question.write_text(json.dumps(wanted), encoding="utf-8")
    command = module_command(str(python), module, question)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=child_environment(threads))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def result_folder(which: Run, into: Path) -> Path:
    """Where `start` lets a toolkit write."""
    return into / which.name.replace(":", "-")


def start(
    which: Run, python: Path, work: Path, into: Path, *, group_size: int, threads: int, budget_minutes: float
) -> dict[str, Any]:
    """One row: quantize, with the time limit.

    Args:
        work: folder with "source" and "tokens.json", as `prepare` wrote them.
        into: folder for the result, its report and its log.

    Returns:
        What the toolkit reported, with "peak_gb", and "total" and "cpu" seconds, or "stopped", or "failed": its last
        words.
    """
    out = result_folder(which, into)
    job_file, report, log = (into / f"{out.name}{suffix}" for suffix in (".json", ".report.json", ".log"))
    Job(
        source=work / "source",
        out=out,
        tokens=work / "tokens.json",
        report=report,
        group_size=group_size,
        threads=threads,
        options=which.options,
    ).write(job_file)
    limit = budget_minutes * 60
    command = module_command(str(python), which.peer, job_file)
    used = watch(command, folder=into, environment=child_environment(threads), log=log, limit=limit)
    row: dict[str, Any] = {"name": which.name, "settings": which.settings, "peak_gb": used.peak_bytes / 1e9}
    if report.is_file():
        row |= json.loads(report.read_text(encoding="utf-8"))
    if used.code is None:
        row |= {"stopped": True, "quantize": limit}
    elif used.code:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        row["failed"] = lines[-1].strip()[:160] if lines else f"exit code {used.code}"
    else:
        row["total"] = sum(row.get(phase, 0.0) for phase in ("load", "quantize", "save"))
        row["cpu"] = sum(row.get(f"{phase}_cpu", 0.0) for phase in ("load", "quantize", "save"))
    return row


def finished(row: dict[str, Any]) -> bool:
    return not row.get("failed") and not row.get("stopped")


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, its header first."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
