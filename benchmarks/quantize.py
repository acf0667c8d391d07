"""This project against other toolkits: seconds, peak memory and what is left of the model.

    python benchmarks/quantize.py                              this project alone, on a model made here
    python benchmarks/quantize.py --peers all --layers 1       everybody, on one layer of it
    python benchmarks/quantize.py MODEL --peers awq_core,autoawq,llmcompressor

One after the other, each as a process of its own, on the same model, windows of tokens and threads. A toolkit named for
the first time gets an environment of its own in --env-folder: about a minute and a gigabyte each.

  quantize   seconds of the toolkit's quantizing call; for this project, that call also reads and writes the model
  total      with loading before it and saving after it; imports are not counted for anybody
  CPU        seconds of all cores together, of the total
  peak       largest resident memory of the process
  ratio      the toolkit's quantize over awq_core's total
  perplexity, KL, same token
             of the files written, against the original, on other text, in fp32, by peers/evaluate.py

Without MODEL the model is the example's, widened to 128 M parameters: the function it computes, and so its perplexity,
is nearly that of the small one (peers/prepare.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.environments import OURS, RUNS, TORCH, choose, interpreter
from peers.running import ask, finished, markdown, result_folder, say, start

HERE = Path(__file__).resolve().parent
TIMED = ("toolkit", "version", "settings", "quantize s", "total s", "CPU s", "peak GB", "ratio")
MEASURED = ("perplexity", "KL", "same token")
HEADER: tuple[str, ...] = TIMED + MEASURED
TEXT = "held-out"
FILES = {"source": "source", "tokens": "tokens.json", "reference": "reference"}


def mean(found: dict[str, Any]) -> dict[str, Any]:
    """What evaluate.py found of one result, window by window, as means."""
    if "failed" in found:
        return found
    mean = {name: sum(values) / len(values) for name, values in found[TEXT].items()}
    return {"perplexity": math.exp(mean.pop("nll")), **mean}


def table(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows in words, HEADER first."""
    ours = next((row["total"] for row in rows if row["name"] == "awq_core" and finished(row)), None)

    def words(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if key in row else ""

    lines = [HEADER]
    for row in rows:
        at_least = ">" if row.get("stopped") else ""
        ratio = f"{at_least}{row['quantize'] / ours:.1f}" if ours and "quantize" in row else ""
        seconds = at_least + words(row, "quantize", ".1f")
        if row.get("failed"):
            seconds, ratio = "failed", ""
        numbers = (words(row, "total", ".1f"), words(row, "cpu", ".0f"), words(row, "peak_gb", ".2f"), ratio)
        measured = (words(row, "perplexity", ".3f"), words(row, "kl", ".5f"), words(row, "agreement", ".1%"))
        settings = ", ".join(row[key] for key in ("settings", "dtype") if row.get(key))
        lines.append((row["name"], row.get("version", ""), settings, seconds, *numbers, *measured))
    return lines


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder of an unquantized model (default: made here)")
    names = ", ".join(run.name for run in RUNS)
    parser.add_argument("--peers", default=",".join(OURS), help=f"comma-separated, or all: {names} (default: ours)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--calib", metavar="SOURCE", help="any source of `awq quantize` (default: standard library)")
    parser.add_argument("--held-out", metavar="SOURCE", help="text to measure on (default: library modules of its own)")
    parser.add_argument("--windows", type=int, default=16, help="windows to measure on (default: 16)")
    parser.add_argument("--layers", type=int, help="cut the model to its first layers, for everybody")
    parser.add_argument("--width", type=int, default=5, help="of the model made here (default: 5, 128 M parameters)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: every core)")
    parser.add_argument("--budget-minutes", type=float, default=30, help="a run is stopped after so many (default: 30)")
    parser.add_argument("--env-folder", type=Path, default=HERE.parent / ".cache" / "peers", metavar="DIR")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for models, results and logs, not removed")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    args = parser.parse_args()
    try:
        args.runs = choose(args.peers)
    except ValueError as error:
        parser.error(str(error))
    return args


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything, in order: environments, model and tokens, runs, measures."""
    pythons = {peer: interpreter(peer, args.env_folder, say) for peer in {run.peer: None for run in args.runs}}
    fields = ("width", "layers", "samples", "seq_len", "windows", "calib", "model")
    wanted = {name: getattr(args, name) for name in fields} | {"texts": {TEXT: args.held_out}}
    made = ask("prepare", wanted | {"source": str(work / "source"), "tokens": str(work / "tokens.json")}, work, 1)
    load = os.getloadavg()[0]
    if load > 0.5:
        say(f"the machine is busy (load {load:.1f}): read the CPU seconds, not the others")
    rows = []
    limits = {name: getattr(args, name) for name in ("group_size", "threads", "budget_minutes")}
    for which in args.runs:
        say(f"{which.name} ...")
        rows.append(start(which, pythons[which.peer], work, work, **limits))
        seconds = rows[-1].get("failed") or f"{rows[-1]['quantize']:.1f} s" + " (stopped)" * rows[-1].get("stopped", 0)
        say(f"{which.name}: {seconds}")
    say("measuring the results ...")
    done = [which for which, row in zip(args.runs, rows, strict=True) if finished(row)]
    question = {name: str(work / file) for name, file in FILES.items()} | {"threads": args.threads}
    question["results"] = {which.name: str(result_folder(which, work)) for which in done}
    measured = {name: mean(found) for name, found in ask("evaluate", question, work, args.threads).items()}
    for row in rows:
        row |= measured.get(row["name"], {})
    model = Path(args.model).resolve().name if args.model else f"pycoder, {args.width} times as wide"
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": TORCH, "load": load}
    settings = {name: getattr(args, name) for name in ("samples", "seq_len", "group_size", "threads")}
    original = {"name": "original", "settings": "bf16", **measured["original"]}
    return {"model": model, **made, **settings, "machine": machine, "rows": [original, *rows]}


def main() -> None:
    args = parse()
    if args.keep:
        args.keep.mkdir(parents=True)
        found = compare(args, args.keep.resolve())
    else:
        with tempfile.TemporaryDirectory(prefix="awq-peers-") as folder:
            found = compare(args, Path(folder))
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{found['model']}: {found['layers']} layers, {found['parameters'] / 1e6:.1f} M parameters, bf16")
    print(f"{args.samples} windows of {args.seq_len} tokens, groups of {args.group_size}, {args.threads} threads\n")
    lines = table(found["rows"])
    print(markdown(lines) if args.markdown else aligned(lines))
    for row in found["rows"]:
        if row.get("failed"):
            print(f"\n{row['name']} failed: {row['failed']}")


if __name__ == "__main__":
    main()
