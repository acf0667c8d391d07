"""The three calls: `plan`, `quantize`, `load`. Everything the command line does goes through them."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.offload import offloading
from awq_core.calibration.prepare import Preprocessors, prepare_for
from awq_core.calibration.subsets import Subsets
from awq_core.checkpoint.config_json import config_json
from awq_core.checkpoint.files import side_files
from awq_core.checkpoint.format import already_quantized
from awq_core.checkpoint.reader import CheckpointReader, fingerprint
from awq_core.checkpoint.stacks import unstacked
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.config import QuantConfig
from awq_core.devices import compute_dtype, pick_devices
from awq_core.errors import CheckpointError, ConfigError
from awq_core.hooks.manager import PluginManager, default_manager
from awq_core.identity import digest, identity
from awq_core.mixed import Allocation, Target, keeping, room, verify
from awq_core.model_card import head_note, model_card
from awq_core.model_folder import open_config, raw_config, resolve
from awq_core.plan_types import Plan
from awq_core.planning import make_plan
from awq_core.quantization.block import LinearReport
from awq_core.quantization.engine import BlockDone, Engine
from awq_core.quantization.engines import spreading
from awq_core.quantization.proof import Proof, require_proof
from awq_core.quantization.reuse import SCALES, Found, scales_file
from awq_core.quantization.sensitivity import Sensing, allocation_for
from awq_core.quantization.shards import sharded
from awq_core.recipe import RECIPE, recipe_text
from awq_core.report.card import section
from awq_core.report.collect import record_of
from awq_core.report.record import RECORD, Cost
from awq_core.runtime.load import load
from awq_core.skeleton import build_skeleton, checkpoint_names

__all__ = ["Phase", "QuantizeResult", "load", "plan", "quantize"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Phase:
    """Progress: a step before the blocks has begun or ended; `text` is for people."""

    text: str


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What `quantize` did. `allocation` is what it chose for a target; None without one, and where it took over the
    choice of the unfinished run that it resumed. `cost` is time and memory, those of the runs it resumed included."""

    out: Path
    plan: Plan
    proof: Proof
    reports: tuple[LinearReport, ...]
    calibration: CalibrationData | None
    seconds: float
    allocation: Allocation | None = None
    cost: Cost | None = None


def plan(
    model: PathLike,
    *,
    config: QuantConfig | None = None,
    plugin: str | None = None,
    trust_remote_code: bool = False,
    samples: int = 128,
    seq_len: int = 512,
    manager: PluginManager | None = None,
) -> Plan:
    """What would happen to every weight of `model`, from its config.json alone.

    Args:
        model: local folder or hub name.
        config: settings; default `QuantConfig()`.
        plugin: owner, where two installed plugins claim the model.
        samples, seq_len: planned calibration, for the memory estimate.

    Raises:
        UnsupportedModelError, PluginConflictError: nobody, or more than one plugin, owns the model.
        PlanError: the plugin's groups do not fit the model.
    """
    manager = manager or default_manager()
    folder = resolve(model, weights=False)
    _refuse_quantized(folder, raw_config(folder))
    typed, owner = open_config(folder, manager, plugin=plugin, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(typed, trust_remote_code=trust_remote_code)
    manager.prepare_model(owner, skeleton)
    itemsize = torch.empty(0, dtype=_declared_dtype(typed)).element_size()
    tokens = samples * seq_len
    return make_plan(skeleton, owner, manager, config or QuantConfig(), calibration_tokens=tokens, itemsize=itemsize)


def quantize(
    model: PathLike,
    out: PathLike,
    *,
    config: QuantConfig | None = None,
    calibration: Any = None,
    samples: int = 128,
    seq_len: int = 512,
    subsets: Subsets | None = None,
    calib_shards: int = 1,
    plugin: str | None = None,
    device: str = "auto",
    engine: str = "local",
    address: str | None = None,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    restart: bool = False,
    offload: PathLike | None = None,
    reuse: PathLike | None = None,
    target_bits: float | None = None,
    target_size: str | float | None = None,
    manager: PluginManager | None = None,
    progress: Callable[[Phase | BlockDone | Sensing | Allocation], None] | None = None,
) -> QuantizeResult:
    """Quantize a model folder into an AWQ checkpoint.

    Args:
        model: local folder or hub name of an unquantized model.
        out: folder to write; must be empty, not exist, or hold an unfinished run, which is resumed. Appears whole or
            not at all.
        config: settings; default `QuantConfig()`.
        calibration: text file, .jsonl, .jsonl.zst, .parquet, folder of texts or of images with captions, Hugging Face
            dataset name, list of strings or of token lists, or ready `CalibrationData`; None is the built-in default.
        samples, seq_len: calibration windows and tokens in each.
        subsets: calibrate on these subsets only of a corpus whose rows name one, as The Pile's do.
        calib_shards: parts of the calibration samples whose forward passes are independent work, for `engine` "ray" and
            several devices. The number decides the last bit of sums over tokens, and who works them does not.
        plugin: owner, where two installed plugins claim the model.
        device: "auto" (CUDA where present), "cpu", "cuda:1", ...; "cuda:0,cuda:1" shares a block's searches out.
        engine: "local", or "ray": a block's searches, and its forward passes over `calib_shards`, are tasks on a Ray
            cluster. The same bytes either way.
        address: of the cluster, as `ray.init` takes it: "auto", "host:6379"; None is one of its own on this machine.
        dtype: of activations while calibrating; "auto" is the checkpoint's where the device is fast in it.
        tokenizer: replaces the model folder's own.
        restart: start over instead of resuming.
        offload: existing folder on whose disk the activations between blocks are kept, instead of in memory. The result
            is the same, byte for byte.
        reuse: folder of a finished run on the same model, whose scales are taken, and with the same group size its
            ranges too: then nothing is calibrated or searched.
        target_bits: stored bits a weight, such as 4.6, on average over the linears that would be quantized: those whose
            4 bits would cost the most stay in 16, chosen by a backward pass over calibration samples.
        target_size: the same for the bytes of all weights: "5GB".
        progress: called with `Phase` and `BlockDone` values; with a target, also `Sensing` and the `Allocation`.

    Raises:
        AwqError: one of its kinds, each with what to try next; nothing that looks finished is left behind.
    """
    started = time.perf_counter()
    config = config or QuantConfig()
    manager = manager or default_manager()
    say = progress or (lambda event: None)
    goal = Target.of(target_bits, target_size)
    folder = resolve(model)
    raw = raw_config(folder)
    _refuse_quantized(folder, raw)
    typed, owner = open_config(folder, manager, plugin=plugin, trust_remote_code=trust_remote_code)
    devices = pick_devices(device)
    target = devices[0]
    with (
        ExitStack() as opened,
        spreading(engine, address, devices) as spread,
        offloading(offload) as activations,
        CheckpointWriter(Path(out), restart=restart) as writer,
        CheckpointReader(folder) as reader,
    ):
        stored = reader.main_dtype
        compute = compute_dtype(dtype, stored, target)
        skeleton = build_skeleton(typed, dtype=compute, trust_remote_code=trust_remote_code)
        manager.prepare_model(owner, skeleton)
        make = partial(
            make_plan, skeleton, owner, manager, calibration_tokens=samples * seq_len, itemsize=stored.itemsize
        )
        decided = make(config)
        reader = unstacked(reader, skeleton)
        names = checkpoint_names(skeleton, reader.names)
        step_dtype = torch.bfloat16 if stored is torch.bfloat16 else torch.float16
        source = fingerprint(folder)
        head = decided.head.linear.name if decided.head else ""
        found = opened.enter_context(Found(reuse, source, names)) if reuse is not None else None
        walk = Engine(
            reader,
            skeleton,
            names,
            decided,
            device=target,
            step_dtype=step_dtype,
            offload=activations,
            found=found,
            spread=spread,
            run=sharded(calib_shards, spread),
        )
        _refuse_empty(decided)
        if goal is not None:
            room(decided, goal, stored.itemsize)
        if decided.head:
            say(Phase(head_note(decided.head)))
        for name in decided.unused_names():
            say(Phase(f"no linear's name contains {name!r}: nothing is kept by it"))
        proof = require_proof(typed, owner, manager, trust_remote_code=trust_remote_code)
        say(Phase(f"{owner.dist} {owner.version}: {proof.groups} scale groups proved, error {proof.error:.1e}"))
        data = None
        searching = config.needs_calibration and (found is None or not found.suffices(config, head))
        if searching or goal is not None:
            data, seq_len, told = prepare_for(
                typed,
                calibration,
                Preprocessors(folder, tokenizer, trust_remote_code),
                partial(manager.calibration_batch, owner),
                samples=samples,
                seq_len=seq_len,
                subsets=subsets,
                seed=config.seed,
            )
            for text in told:
                say(Phase(text))
        asked: dict[str, Any] | None = None
        allocation = None
        if goal is not None and data is not None:
            before = identity(source, decided, data, compute, target, reuse, calib_shards)
            asked = {"bits": goal.bits, "size": goal.size, "of": digest(before)}
            unfinished = writer.unfinished or {}
            if unfinished.get("target") == asked:
                config = replace(config, modules_to_not_convert=tuple(unfinished["config"]["modules_to_not_convert"]))
                decided = make(config)
            else:
                allocation = allocation_for(walk, goal, data, stored.itemsize, say)
                say(allocation)
                config = keeping(decided, allocation)
                verify(decided, mixed := make(config), allocation)
                decided = mixed
            walk.plan = decided
        seen = data if searching else None
        if writer.begin({**identity(source, decided, data, compute, target, reuse, calib_shards), "target": asked}):
            say(Phase(f"resuming: {len(writer.finished)} finished steps found in {out}"))
        if writer.complete:
            reports = tuple(LinearReport(**r) for done in writer.finished.values() for r in done.get("reports", ()))
            seconds = time.perf_counter() - started
            cost = Cost.of(writer.finished, writer.finished, seconds)
            return QuantizeResult(Path(out), decided, proof, reports, data, seconds, allocation, cost)
        earlier = tuple(writer.finished)
        reports = tuple(walk.run(seen, writer, say))
        for note, count in Counter(report.note for report in reports if report.note).items():
            say(Phase(f"{count} linears rounded by greedy flips: {note}"))
        seconds = time.perf_counter() - started
        files: dict[str, bytes | str | Path] = {**side_files(folder, include_code=trust_remote_code)}
        files["config.json"] = _json(config_json(raw, typed, decided, names))
        done: dict[str, Any] = {"device": target, "dtype": compute, "target": str(goal or "")}
        about = (str(model), decided, proof, reports, seen)
        record = record_of(*about, itemsize=stored.itemsize, reused=found is not None, **done)
        files[RECORD] = record.to_json()
        files["README.md"] = model_card(*about, reused=found is not None, report=section(record))
        used = {"samples": samples, "seq_len": seq_len, "calib_shards": calib_shards}
        files[RECIPE] = recipe_text(
            decided,
            model=model,
            calibration=calibration,
            calibrated=None if seen is None else {} if seen is calibration else used,
            subsets=subsets,
            mixture=seen.mixture if seen else (),
            trust_remote_code=trust_remote_code,
            reuse=reuse,
            **done,
        )
        searched = [one["scales"] for one in writer.finished.values() if one.get("scales")]
        if searched:
            files[SCALES] = scales_file(searched, source)
        writer.finish(files)
        cost = Cost.of(writer.finished, earlier, time.perf_counter() - started)
    return QuantizeResult(Path(out), decided, proof, reports, data, seconds, allocation, cost)


def _refuse_quantized(folder: Path, raw: dict[str, Any]) -> None:
    if method := already_quantized(raw):
        raise CheckpointError(f"{folder}: already quantized ({method})", hint="start from the original model")


def _refuse_empty(plan_: Plan) -> None:
    """A folder labelled AWQ in which nothing is 4-bit would help nobody."""
    if not any(linear.quantize for linear in plan_.linears):
        reasons = Counter(linear.reason for linear in plan_.linears if linear.reason)
        why = next((reason for reason, _ in reasons.most_common(1)), "the model has no linears")
        raise ConfigError(f"nothing would be quantized: {why}", hint="awq plan shows every weight; try --group-size 32")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _declared_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
