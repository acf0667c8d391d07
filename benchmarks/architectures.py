"""Every decoder language model of the installed transformers: who owns it, is it proved, what is left out, and why.

    python benchmarks/architectures.py                         all of them, as the table docs/architectures.md
    python benchmarks/architectures.py --only opt phi mamba    some, on stdout
    python benchmarks/architectures.py --no-plugins            inference alone, as if no plugin were installed

Each model type is tried in a process of its own, on a tiny random model of its default configuration, so a crash or a
long wait is a row of the table and not its end. `made` says whether that model was then quantized, saved, loaded and
generated from; `fused` says whether the owner has run-time fusions.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# A server that has imported everything once, and forks a child for each row.
CHILDREN = get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch", "transformers", "awq_core.api", "awq_core.inference"])
TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
WINDOWS = [[10 + (7 * token + 3 * window) % 50 for token in range(32)] for window in range(2)]  # of 64 tokens
HEAD = """# Architectures

Every model type with a decoder language model in transformers {transformers}, made by `{command}` with awq-core
{core}. *Owner* is the plugin that claims it, or `inferred` where none does and `--infer` proved it. The *error* is that
of the proof on a tiny random model, below 1e-4 where the scale groups are right; *coverage* the share of the blocks'
parameters that become 4-bit, in the whole default model for a plugin and in the tiny one for inference; *groups* the
scale groups in a block of the tiny one. What a plugin does not know, and inference cannot prove, has the reason.
*Made*: the tiny model was quantized, saved and loaded, and generated three tokens; *s*: seconds for all of it, two at a
time on two cores.

{proved} of {all} are proved, {owned} by plugins and {inferred} by inference; {made} are made.

| model type | owner | error | coverage | groups | made | fused | s | what is left out, or why not |
|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One model type. `error` is None where nothing could be proved; `why` says what is left out then, or not."""

    model_type: str
    owner: str = "-"
    error: float | None = None
    coverage: float | None = None
    groups: int = 0
    made: bool = False
    fused: bool = False
    why: str = ""
    seconds: float = 0.0

    @property
    def proved(self) -> bool:
        return self.error is not None and self.error <= 1e-4 and self.groups > 0


def model_types() -> list[str]:
    """Of causal language models, and of models of image and text."""
    from transformers.models.auto import modeling_auto as auto

    names = {*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return sorted(names)


def examine(model_type: str, *, plugins: bool) -> Row:
    """The row of one model type, in this process."""
    from transformers import CONFIG_MAPPING

    from awq_core.errors import UnsupportedModelError
    from awq_core.hooks.manager import PluginManager, default_manager
    from awq_core.skeleton import model_class

    try:
        config: Any = CONFIG_MAPPING[model_type]()
        config.architectures = None
        model_class(config)
    except Exception as error:
        return Row(model_type, why=f"its default configuration does not build: {_line(error)}")
    manager = default_manager() if plugins else PluginManager(allow=())
    try:
        owner = manager.owner(config)
    except UnsupportedModelError:
        return _inferred(model_type, config)
    return _owned(model_type, config, owner, manager)


def _inferred(model_type: str, config: Any) -> Row:
    from awq_core.inference import infer
    from awq_core.inference.tiny import tiny_model

    found = infer(config)
    left = [f"{one.linear}: {one.why}" for one in found.unscaled]
    left += [] if found.coverage > 0.9 else [f"no linear: {one}" for one in found.unreached]
    groups = len(found.arch.scale_groups)
    if found.why_not:
        return Row(model_type, coverage=found.coverage, groups=groups, why=found.why_not)
    unmade = made(tiny_model(config, False, 0)[0], found.manager())
    left = unmade + left
    return Row(model_type, "inferred", found.proof.error, found.coverage, groups, not unmade, why="; ".join(left))


def _owned(model_type: str, config: Any, owner: Any, manager: Any) -> Row:
    from awq_core.config import QuantConfig
    from awq_core.planning import make_plan
    from awq_core.quantization.proof import prove_model, tiny_model
    from awq_core.skeleton import build_skeleton

    model = tiny_model(config, owner, manager)
    plan = make_plan(model, owner, manager, QuantConfig(group_size=-1))
    coverage = plan.coverage
    with suppress(ValueError):  # some default configurations contradict themselves
        whole = build_skeleton(config)
        manager.prepare_model(owner, whole)
        coverage = make_plan(whole, owner, manager, QuantConfig(group_size=-1)).coverage
    blocks = [block for block in plan.blocks if block.quantized]
    grouped = {name for block in blocks for group in block.groups for name in group.layers}
    alone = {block.local(one) for block in blocks for one in block.quantized} - grouped
    groups = max((len(block.groups) for block in blocks), default=0)
    fused = bool(manager.fused_blocks(owner, model, "reference"))
    left = [f"no scales: {', '.join(sorted(alone))}"] if alone else []
    error = prove_model(model, owner, manager).error
    unmade = made(model.config, manager)
    return Row(model_type, owner.plugin, error, coverage, groups, not unmade, fused, "; ".join(unmade + left))


def made(config: Any, manager: Any) -> list[str]:
    """Quantize a random model of this configuration, save, load, generate: nothing, or what went wrong."""
    import torch

    from awq_core.api import quantize
    from awq_core.config import QuantConfig
    from awq_core.runtime.load import load
    from awq_core.testing.tiny import save_tiny

    options: dict[str, Any] = {"config": QuantConfig(group_size=-1), "samples": 2, "seq_len": 32, "manager": manager}
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        try:
            save_tiny(config, source)
            quantize(source, out, calibration=WINDOWS, **options)
            ids = torch.arange(10, 19)[None]
            tokens = load(out, manager=manager).generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        except Exception as error:
            return [f"not made: {_line(error).replace(f'{folder}/', '')}"]
    return [] if tokens.shape[1] > ids.shape[1] else ["not made: it generates nothing"]


def apart(model_type: str, *, plugins: bool, limit: float) -> Row:
    """`examine` in a process of its own; whatever happens to that becomes the reason."""
    started = time.perf_counter()
    ours, theirs = CHILDREN.Pipe(duplex=False)
    child = CHILDREN.Process(target=_child, args=(theirs, model_type, plugins), daemon=True)
    child.start()
    theirs.close()
    try:
        row = ours.recv() if ours.poll(limit) else Row(model_type, why=f"not done within {limit:.0f} s")
    except EOFError:
        child.join()
        row = Row(model_type, why=f"its process ended with {child.exitcode}")
    child.kill()
    child.join()
    return replace(row, seconds=round(time.perf_counter() - started, 1))


def _child(answer: Any, model_type: str, plugins: bool) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        row = examine(model_type, plugins=plugins)
    except Exception as error:
        row = Row(model_type, why=_line(error))
    answer.send(row)


def line(row: Row) -> str:
    """The row in Markdown."""
    error = "-" if row.error is None else f"{row.error:.0e}"
    coverage = "-" if row.coverage is None else f"{row.coverage:.1%}"
    why = row.why.replace("|", "/").replace("<", "&lt;").replace("*", "\\*")
    why = why if len(why) < 240 else why[:237] + "..."
    fused = "yes" if row.fused else "no"
    done = "yes" if row.made else "no"
    cells = (f"`{row.model_type}`", row.owner, error, coverage, row.groups, done, fused, f"{row.seconds:.0f}", why)
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: list[Row], command: str) -> str:
    """The whole page."""
    import transformers

    from awq_core import __version__

    proved = [row for row in rows if row.proved]
    inferred = sum(row.owner == "inferred" for row in proved)
    head = HEAD.format(
        transformers=transformers.__version__,
        core=__version__,
        command=command,
        proved=len(proved),
        all=len(rows),
        owned=len(proved) - inferred,
        inferred=inferred,
        made=sum(row.made for row in rows),
    )
    return head + "".join(line(row) + "\n" for row in rows)


def _line(error: BaseException) -> str:
    """An error in one line; the project's own say what is wrong without their class."""
    ours = getattr(error, "message", "")
    text = next(iter(str(error).strip().splitlines()), "")
    return ours or (f"{type(error).__name__}: {text}" if text else type(error).__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types, printed and not written")
    parser.add_argument("--no-plugins", action="store_true", help="inference alone")
    parser.add_argument("--limit", type=float, default=240, metavar="S", help="seconds for one model type")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time")
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write (docs/architectures.md)")
    parser.add_argument("--json", action="store_true", help="rows as JSON lines on stdout, and no file")
    given = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")

    def one(model_type: str) -> Row:
        row = apart(model_type, plugins=not given.no_plugins, limit=given.limit)
        print(f"{row.seconds:6.1f} s  {line(row)}" if not given.json else json.dumps(asdict(row)), flush=True)
        return row

    with ThreadPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(one, given.only or model_types()))
    if not given.only and not given.json:
        command = " ".join(["python benchmarks/architectures.py", *(["--no-plugins"] if given.no_plugins else [])])
        given.out.write_text(table(rows, command), encoding="utf-8")
        print(f"{given.out}: {sum(row.proved for row in rows)} of {len(rows)} proved")


if __name__ == "__main__":
    main()
