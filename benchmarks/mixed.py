"""Mixed precision, measured: does its sensitivity rank units as their true KL does, and is its choice a good one?

  python benchmarks/mixed.py                                   the demo model, --target-bits 4.5, 5 and 6
  python benchmarks/mixed.py MODEL --text held_out.txt --targets 4.6

units      each unit alone in 4 bits, all else as it was: KL(original ‖ changed), beside the sensitivity. Rank
           correlation (Spearman's), and the sum of all sensitivities over the sum of all KLs.
targets    KL, of the folders written, of uniform 4 bits, of `--target-bits`, and of a rule of the same size that keeps
           the first layer, then the last, the second, the last but one... as they are, as far as the size allows.
           The difference is of the target minus the rule, paired window by window.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import awq_core
from awq_core.api import QuantizeResult
from awq_core.cli.demo_data import HELD_OUT, held_out_modules, held_out_texts
from awq_core.evaluation import compare_models, divergence
from awq_core.mixed import Allocation, Choice
from awq_core.plan_types import Plan
from awq_core.planning import saved_bytes

Run = Callable[..., QuantizeResult]


def ranks(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def units(run: Run, original: PreTrainedModel, tokenizer: Any, text: str, windows: int, plan: Plan) -> None:
    """One unit at a time is quantized, as the run with a target would quantize it."""
    rows = []
    every = {linear.name for linear in plan.linears if linear.quantize}
    allocation = run("units", plan.config, 8.0).allocation
    assert allocation is not None
    print("\nunit                                  sensitivity      KL   nats a token / 1000")
    for number, choice in enumerate(allocation.choices):
        others = every - {linear.name for linear in choice.unit.linears}
        config = replace(plan.config, modules_to_not_convert=tuple(sorted(others)))
        changed = awq_core.load(run(f"unit-{number}", config).out, dtype=torch.float32, fake_quant=True)
        rows.append((choice.cost, divergence(original, changed, tokenizer, text, max_windows=windows).kl_mean))
        title = f"{choice.unit.block} {choice.title}"
        print(f"{title:36s}  {rows[-1][0] * 1e3:11.3f}  {rows[-1][1] * 1e3:6.3f}", flush=True)
    costs, measured = zip(*rows, strict=True)
    print(f"rank correlation {spearman(costs, measured):.3f}, sum over sum {sum(costs) / sum(measured):.2f}")


def outer_layers(allocation: Allocation, itemsize: int, room: int) -> set[str]:
    """Names of linears kept: units of the first layer, then of the last, and so on inwards, that fit into `room`."""
    layers = list(dict.fromkeys(choice.unit.block for choice in allocation.choices))
    inwards = [layers[i // 2] if i % 2 == 0 else layers[-1 - i // 2] for i in range(len(layers))]
    kept: set[str] = set()
    for choice in sorted(allocation.choices, key=lambda choice: inwards.index(choice.unit.block)):
        more = extra([choice], itemsize)
        if more <= room:
            kept.update(linear.name for linear in choice.unit.linears)
            room -= more
    return kept


def extra(choices: Sequence[Choice], itemsize: int) -> int:
    return sum(saved_bytes(linear, itemsize) for choice in choices for linear in choice.unit.linears)


def by_rule(plan: Plan, allocation: Allocation, itemsize: int) -> tuple[awq_core.QuantConfig, float]:
    """(the rule's configuration at the size of the allocation, the bits it comes to)."""
    kept = outer_layers(allocation, itemsize, extra([one for one in allocation.choices if one.kept], itemsize))
    names = {linear.name for choice in allocation.choices for linear in choice.unit.linears}
    weights = sum(choice.unit.weights for choice in allocation.choices)
    saved = sum(saved_bytes(one, itemsize) for one in plan.linears if one.name in names - kept)
    bits = 8 * (itemsize - saved / weights)
    return replace(plan.config, modules_to_not_convert=tuple(sorted(kept))), bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="examples/pycoder")
    parser.add_argument("--text", help="held-out text; default: the modules the model says it has not seen")
    parser.add_argument("--targets", type=float, nargs="+", default=[4.5, 5.0, 6.0])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32, help="of held-out text")
    parser.add_argument("--unit-windows", type=int, default=8, help="of held-out text, for each unit alone")
    options = parser.parse_args()
    folder = Path(options.model)
    if options.text:
        text = Path(options.text).read_text(encoding="utf-8")
    elif (folder / HELD_OUT).is_file():
        text = "\n".join(held_out_texts(held_out_modules(folder), 400_000))
    else:
        raise SystemExit("give --text: held-out text to measure on")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = awq_core.load(folder, dtype=torch.float32)
    uniform = awq_core.QuantConfig(group_size=options.group_size, rounding=options.rounding)
    plan = awq_core.plan(folder, config=uniform)

    with tempfile.TemporaryDirectory() as scratch:

        def run(name: str, config: awq_core.QuantConfig, target: float | None = None) -> QuantizeResult:
            return awq_core.quantize(
                folder, Path(scratch) / name, config=config, samples=options.samples, target_bits=target
            )

        run("uniform", uniform)
        rows = []
        for target in options.targets:
            ours = run(f"target-{target}", uniform, target)
            assert ours.allocation is not None
            config, bits = by_rule(plan, ours.allocation, stored_itemsize(folder))
            run(f"rule-{target}", config)
            models = [
                awq_core.load(Path(scratch) / f"{kind}-{target}", dtype=torch.float32, fake_quant=True)
                for kind in ("target", "rule")
            ]
            found = compare_models(original, *models, tokenizer, text, max_windows=options.windows, block_windows=0)
            rows.append((target, ours.allocation.bits, bits, found.kl))
        plain = awq_core.load(Path(scratch) / "uniform", dtype=torch.float32, fake_quant=True)
        kl = divergence(original, plain, tokenizer, text, max_windows=options.windows)
        print(f"uniform 4 bits: KL {kl.kl_mean:.4f} ± {kl.kl_stderr:.4f}")
        print("target    bits  rule's   KL by target      KL by rule        difference")
        for target, bits, rule, pair in rows:
            cells = "  ".join(f"{one.mean:7.4f} ± {one.stderr:.4f}" for one in (pair.a, pair.b, pair.difference))
            print(f"{target:6.2f}  {bits:6.3f}  {rule:6.3f}  {cells}", flush=True)
        units(run, original, tokenizer, text, options.unit_windows, plan)


def stored_itemsize(folder: Path) -> int:
    from awq_core.checkpoint.reader import CheckpointReader

    with CheckpointReader(folder) as reader:
        return reader.main_dtype.itemsize


if __name__ == "__main__":
    main()
