"""`awq quantize`: one call of `awq_core.quantize`, watched while it works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from awq_core.cli.options import (
    infer_option,
    json_option,
    make_config,
    plugin_option,
    trust_option,
    weight_options,
)
from awq_core.cli.output import command_line, duration, note, print_json_line, weight_bytes
from awq_core.cli.recipe import recipe_option

if TYPE_CHECKING:
    from awq_core.api import QuantizeResult
    from awq_core.calibration import CalibrationData


@click.command(
    epilog="""\b
Examples:
  awq quantize MODEL --out DIR
  awq quantize MODEL --out DIR --calib corpus.jsonl --samples 256
  awq quantize MODEL --out DIR --calib pile.jsonl.zst --calib-subsets ArXiv,Github
  awq quantize MODEL --out DIR --group-size 32 --component vision=keep
  awq quantize MODEL --out DIR --target-bits 4.6
  awq quantize MODEL --out DIR --engine ray --address auto --calib-shards 8
  awq quantize --recipe recipe.yaml --out DIR
  awq quantize MODEL --out DIR --infer
  awq quantize MODEL --out DIR --group-size 64 --reuse EARLIER
  awq quantize MODEL --out DIR --rounding nearest --no-scale
\b
The last is round-to-nearest without calibration: --no-scale switches the clip
off too. `--no-scale --clip asymmetric` clips without scales, which calibrates.
DIR appears whole or not at all. A run that was killed, or ran out of disk, is
resumed by the same command, with the same bytes as if it had never stopped.
With --json, stdout has one JSON object a line: phases, blocks, then the result.
"""
)
@click.argument("model")
@click.option("--out", required=True, metavar="DIR", help="Folder to write: new, empty, or an unfinished run.")
@click.option(
    "--calib",
    metavar="FILE|FOLDER|DATASET",
    help="Text to calibrate on: a file, a folder of texts or captioned images, a hub dataset.  "
    "[default: the Python standard library's source]",
)
@click.option(
    "--calib-subsets", metavar="A,B", help="Of a corpus whose rows have meta.pile_set_name: only these, ArXiv,Github."
)
@click.option("--calib-exclude", metavar="A,B", help="All subsets but these.")
@recipe_option
@weight_options
@plugin_option
@infer_option
@click.option(
    "--device",
    default="auto",
    metavar="DEVICE",
    help="cpu, cuda, cuda:1; cuda:0,cuda:1 shares the searches out; auto is CUDA where there is one.",
)
@click.option(
    "--engine", default="local", metavar="NAME", help="local, or ray: the searches are tasks on a Ray cluster."
)
@click.option(
    "--calib-shards",
    type=click.IntRange(min=1),
    metavar="N",
    default=1,
    help="Work the calibration samples in N parts, which --engine ray and several devices share out.",
)
@click.option("--address", metavar="ADDRESS", help="Of --engine ray: auto, host:port.  [default: one on this machine]")
@click.option("--dtype", default="auto", help="Of activations while calibrating: float32, bfloat16.")
@click.option("--seed", type=int, default=0, help="Draws the calibration samples.")
@click.option("--offload", metavar="DIR", help="Keep the activations between blocks on DIR's disk, not in memory.")
@click.option(
    "--reuse", metavar="DIR", help="Take scales, and ranges at the same group size, from a finished run on MODEL."
)
@click.option(
    "--target-bits", type=float, metavar="B", help="Average bits a weight, such as 4.6: the most sensitive stay in 16."
)
@click.option("--target-size", metavar="SIZE", help="The same for the size of all weights: 5GB, 4.7GiB.")
@click.option(
    "--layers-per-batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Accepted and not used: one block at a time is in memory, however many layers there are.",
)
@click.option("--restart", is_flag=True, help="Clear an unfinished run in DIR instead of resuming it.")
@trust_option
@json_option
def quantize(
    model: str,
    out: str,
    recipe: str | None,
    calib: str | None,
    calib_subsets: str | None,
    calib_exclude: str | None,
    samples: int,
    seq_len: int,
    plugin: str | None,
    infer: bool,
    device: str,
    engine: str,
    calib_shards: int,
    address: str | None,
    dtype: str,
    seed: int,
    offload: str | None,
    reuse: str | None,
    target_bits: float | None,
    target_size: str | None,
    layers_per_batch: int | None,
    restart: bool,
    trust_remote_code: bool,
    as_json: bool,
    **weights: Any,
) -> None:
    """Quantize MODEL, a folder or a hub name, into an AWQ checkpoint."""
    config = make_config(**weights, seed=seed)
    if calib is not None and not config.needs_calibration and target_bits is None and target_size is None:
        note("round-to-nearest needs no calibration: --calib is not read")
    if calib is None and (calib_subsets or calib_exclude):
        raise click.UsageError("--calib-subsets and --calib-exclude choose from --calib, which is missing")
    if layers_per_batch is not None:
        note("--layers-per-batch is not needed: one block at a time is in memory, however many layers there are")
    import awq_core
    from awq_core.calibration import Subsets
    from awq_core.cli.inferring import manager_for
    from awq_core.cli.plan_text import describe
    from awq_core.cli.progress import quantizing
    from awq_core.cli.report import report_of_run

    manager = manager_for(model, infer=infer, plugin=plugin, trust_remote_code=trust_remote_code)
    if manager is not None:
        planned = awq_core.plan(
            model, config=config, samples=samples, seq_len=seq_len, trust_remote_code=trust_remote_code, manager=manager
        )
        for line in describe(planned):
            note(line)
    with quantizing(as_json) as progress:
        result = awq_core.quantize(
            model,
            out,
            config=config,
            calibration=calib,
            samples=samples,
            seq_len=seq_len,
            subsets=Subsets.parse(calib_subsets, calib_exclude),
            plugin=plugin,
            device=device,
            engine=engine,
            calib_shards=calib_shards,
            address=address,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            restart=restart,
            offload=offload,
            reuse=reuse,
            target_bits=target_bits,
            target_size=target_size,
            manager=manager,
            progress=progress,
        )
    for text in result.calibration.notes if result.calibration else ():
        note(f"note: {text}")
    page = report_of_run(Path(result.out), result.cost)
    if as_json:
        print_json_line({"event": "done", **summary(result), "page": page})
        return
    tell(result)
    if page is not None:
        note(f"report: {page}")
    note(f"next: {command_line('awq', 'generate', out, '--prompt', 'Once upon a time')}")
    note(f"      {command_line('awq', 'eval', out, '--against', model)}")


def summary(result: QuantizeResult) -> dict[str, Any]:
    """The result as plain values."""
    plan, data = result.plan, result.calibration
    return {
        "out": Path(result.out),
        "family": plan.family,
        "plugin": plan.plugin,
        "dist": plan.dist,
        "version": plan.version,
        "config": plan.config.to_dict(),
        "quantized": sum(linear.quantize for linear in plan.linears),
        "kept": sum(not linear.quantize for linear in plan.linears),
        "coverage": round(plan.coverage, 4),
        "proof_error": result.proof.error,
        "calibration": _calibration(data) if data else None,
        "loss_rtn": total_loss(result, "loss_rtn"),
        "loss": total_loss(result, "loss"),
        "routed_tokens": routed_tokens(result),
        "bytes_before": plan.bytes_before,
        "bytes_after": weight_bytes(Path(result.out)),
        "bits": round(result.allocation.bits, 4) if result.allocation else None,
        "seconds": round(result.seconds, 2),
    }


def _calibration(data: CalibrationData) -> dict[str, Any]:
    mixture = {"mixture": dict(data.mixture)} if data.mixture else {}
    return {"source": data.source, "samples": data.samples, "tokens": data.tokens, **mixture}


def total_loss(result: QuantizeResult, field: str) -> float | None:
    """Sum over linears of "loss_rtn" or "loss"; None where nothing was calibrated."""
    losses = [getattr(report, field) for report in result.reports]
    return None if not losses or None in losses else sum(losses)


def routed_tokens(result: QuantizeResult) -> dict[str, int]:
    """Calibration tokens that were sent to each expert, by its path; empty without a mixture."""
    return {r.name.rpartition(".")[0]: r.routed for r in result.reports if r.routed is not None}


def starved_experts(result: QuantizeResult) -> int:
    """Experts that were sent fewer tokens than they have input channels."""
    widths = {linear.name: linear.in_features for linear in result.plan.linears}
    few = (r.name for r in result.reports if r.routed is not None and r.routed < widths[r.name])
    return len({name.rpartition(".")[0] for name in few})


def tell(result: QuantizeResult) -> None:
    """The result for the eye: where it is, how large, how good, how long it took."""
    from awq_core.sizes import size_text

    before, after = size_text(result.plan.bytes_before), size_text(weight_bytes(Path(result.out)))
    click.echo(f"{result.out}: {before} -> {after} in {duration(result.seconds)}")
    rtn, loss = total_loss(result, "loss_rtn"), total_loss(result, "loss")
    if rtn and loss is not None:
        click.echo(f"output error {loss:.3g}, {loss / rtn:.1%} of round-to-nearest's {rtn:.3g}, summed over linears")
    experts, starved = len(routed_tokens(result)), starved_experts(result)
    if starved:
        click.echo(
            f"{starved} of {experts} experts were sent fewer tokens than they have input channels, and lean on the "
            "statistics of all tokens; more --samples would help"
        )
