"""How near to the original each method stays: the measurements behind docs/accuracy.md.

    python benchmarks/accuracy.py examples/pycoder models/qwen2 models/mixtral --peers all \\
        --text prose=wiki.txt --out accuracy.jsonl
    python benchmarks/accuracy.py --table accuracy.jsonl

Each method quantizes each model at each group size, calibrated on the same windows of one text. What it wrote is read
back to plain weights (peers/layouts.py) and measured on windows of every text (peers/evaluate.py), in fp32, beside the
original on the same windows: so differences between methods have small errors (awq_core/evaluation/paired.py).

One line of JSON goes to --out for each model, group size, method and text, with the numbers of every window. What is
there already is not measured again, so an interrupted benchmark goes on where it was. The tables are made of that file
alone. A toolkit named for the first time gets an environment of its own in --env-folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers.environments import OURS, RUNS, Run, choose, interpreter
from peers.results import ORIGINAL, Key, append, missing, read
from peers.running import ask, finished, result_folder, say, start

HERE = Path(__file__).resolve().parent
STANDARD_LIBRARY = "stdlib"


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE in two."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def own_run(text: str) -> Run:
    """NAME=JSON as a run of this project."""
    name, options = named(text)
    try:
        values = json.loads(options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{options!r} is not JSON: {error}") from None
    return Run(f"awq_core:{name}", ", ".join(f"{key} {value}" for key, value in values.items()), values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL", help="folders of unquantized models")
    names = ", ".join(run.name for run in RUNS)
    parser.add_argument("--peers", default=",".join(OURS), help=f"comma-separated, or all: {names} (default: ours)")
    parser.add_argument("--run", action="append", default=[], type=own_run, metavar="NAME=JSON",
                        help="one more of our runs, awq_core:NAME, with these fields of QuantConfig, such as "
                             "plain='{\"scale\": false}'; repeatable")  # fmt: skip
    parser.add_argument("--calib", default=STANDARD_LIBRARY, metavar="SOURCE",
                        help="any source of `awq quantize` (default: stdlib, without held-out modules)")  # fmt: skip
    parser.add_argument("--text", action="append", default=[], type=named, metavar="NAME=FILE",
                        help="another text than `code`, the held-out modules, to measure on")  # fmt: skip
    parser.add_argument("--group-sizes", default="128,32", help="(default: 128,32)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (default: 128)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window, also when measuring (default: 512)")
    parser.add_argument("--windows", type=int, default=64, help="windows of each text to measure on (default: 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: every core)")
    parser.add_argument(
        "--budget-minutes", type=float, default=120, help="a run is stopped after so many (default: 120)"
    )
    parser.add_argument("--env-folder", type=Path, default=HERE.parent / ".cache" / "peers", metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, added to what is there")
    parser.add_argument("--again", default="", metavar="NAMES",
                        help="runs to measure although FILE has them, or: failed")  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for logs, kept (default: a temporary one)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: print the tables of FILE")
    parser.add_argument(
        "--ours", default="awq_core", metavar="NAME", help="the run that tables compare with (awq_core)"
    )
    args = parser.parse_args()
    try:
        args.runs = [*choose(args.peers), *args.run]
        args.sizes = [int(size) for size in args.group_sizes.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if not args.table and not (args.models and args.out):
        parser.error("give models and --out, or --table")
    if len({model.resolve().name for model in args.models}) < len(args.models):
        parser.error("two models have folders of the same name, which is what the results call them")
    return args


def one_run(which: Run, work: Path, group_size: int, texts: Iterable[str], args: argparse.Namespace) -> dict[str, Any]:
    """Quantize, measure, remove. Returns {text: what to write down}."""
    into = work / f"group-{group_size}"
    into.mkdir(exist_ok=True)
    about: dict[str, Any] = {"settings": which.settings}
    try:
        python = interpreter(which.peer, args.env_folder, say)
    except (subprocess.CalledProcessError, OSError) as error:
        return dict.fromkeys(texts, about | {"failed": f"not installed: {error}"})
    limits = {"threads": args.threads, "budget_minutes": args.budget_minutes}
    row = start(which, python, work, into, group_size=group_size, **limits)
    about |= {name: row[name] for name in ("version", "total", "cpu", "peak_gb") if name in row}
    if not finished(row):
        reason = row.get("failed") or f"stopped after {args.budget_minutes:g} minutes"
        return dict.fromkeys(texts, about | {"failed": reason})
    folder = result_folder(which, into)
    about["bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    try:
        found = measure(work, {which.name: str(folder)}, args.threads)[which.name]
    except subprocess.CalledProcessError as error:  # killed for its memory, say
        found = {"failed": f"measuring ended with {error.returncode}"}
    shutil.rmtree(folder)
    if "failed" in found:
        return dict.fromkeys(texts, about | {"failed": found["failed"]})
    return {text: about | found[text] for text in texts}


def measure(work: Path, results: dict[str, str], threads: int) -> dict[str, Any]:
    files = {"source": "source", "tokens": "tokens.json", "reference": "reference"}
    question = {name: str(work / file) for name, file in files.items()}
    return ask("evaluate", question | {"results": results, "threads": threads}, work, threads)


def measure_model(model: Path, work: Path, args: argparse.Namespace) -> None:
    """All that the file does not have yet of one model."""
    work.mkdir(parents=True)
    texts = {"code": None, **dict(args.text)}
    wanted = {name: getattr(args, name) for name in ("samples", "seq_len", "windows")}
    wanted |= {"model": str(model), "width": 1, "layers": None, "texts": texts}
    wanted |= {"calib": None if args.calib == STANDARD_LIBRARY else args.calib}
    made = ask("prepare", wanted | {"source": str(work / "source"), "tokens": str(work / "tokens.json")}, work, 1)
    calibration = f"{args.samples} windows of {args.seq_len} tokens, {Path(args.calib).name}"
    base = Key(model.resolve().name, made["weights"], calibration, args.windows)
    done, again = read(args.out), args.again.split(",")
    new = missing(done, [base.of_run(ORIGINAL, 0, text) for text in texts])
    if new:
        found = measure(work, {}, args.threads)[ORIGINAL]
        for key in new:
            append(args.out, key, {"parameters": made["parameters"]} | found[key.text])
    for size in args.sizes:
        for which in args.runs:
            left = missing(done, [base.of_run(which.name, size, text) for text in texts], again)
            if left:
                say(f"{model.name}, groups of {size}: {which.name} ...")
                found = one_run(which, work, size, [key.text for key in left], args)
                for key in left:
                    append(args.out, key, found[key.text])
                say(f"    {found[left[0].text].get('failed') or 'done'}")


def main() -> None:
    args = parse()
    if args.table:
        from peers.tables import report

        print(report(read(args.table), args.ours))
        return
    with tempfile.TemporaryDirectory(prefix="awq-accuracy-") as folder:
        for model in args.models:
            work = (args.work or Path(folder)).resolve() / model.resolve().name
            shutil.rmtree(work, ignore_errors=True)
            try:
                measure_model(model, work, args)
            except subprocess.CalledProcessError as error:  # it has said why
                raise SystemExit(f"{model}: {error.cmd[2]} ended with {error.returncode}") from None
            shutil.rmtree(work / "reference", ignore_errors=True)


if __name__ == "__main__":
    main()
