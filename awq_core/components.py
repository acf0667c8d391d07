"""What quantizing each component of a model would cost: a tower, a projector, a language model, one at a time.

A vision-language model loses accuracy in parts of unlike size that save bytes of unlike number. For each component c,

    effect(c) = KL(original ‖ the model with c alone in 4 bits), on prompts with images        saves(c) = bytes

Each result is really made, in a temporary folder: calibrated, searched, rounded and loaded again, as a run would. What
is measured are its weights, as ordinary linears, so no kernel has a part in it. No sample is both calibrated on and
measured on. Effects of components do not quite add up.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from awq_core.api import Phase, plan, quantize
from awq_core.calibration.batches import CalibrationData
from awq_core.config import QuantConfig
from awq_core.errors import CalibrationError, ConfigError
from awq_core.evaluation.captions import caption_batches
from awq_core.evaluation.paired import Estimate
from awq_core.evaluation.samples import sample_divergence, text_logits
from awq_core.hooks.manager import PluginManager, default_manager
from awq_core.model_folder import resolve
from awq_core.plan_types import Plan
from awq_core.runtime.load import load

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class ComponentEffect:
    """One component, quantized alone.

    Attributes:
        component: its name.
        default: what the plugin does with it where nothing is said: "quantize" or "keep".
        linears: how many of its linears are quantized.
        bytes_saved: of the model's weights.
        kl: KL(original ‖ result), nats a token; None where nothing was measured.
        agreement: share of positions where the likeliest token is the original's; None likewise.
        reason: why nothing was measured; empty where something was.
    """

    component: str
    default: str
    linears: int
    bytes_saved: int
    kl: Estimate | None = None
    agreement: Estimate | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ComponentEffects:
    """Every component's effect, and what it was measured on.

    Attributes:
        effects: in the order of the plugin's stacks.
        source: name of the samples.
        measured: samples that were measured on.
        calibrated: other samples, that were calibrated on.
        positions: positions that were compared, of all measured samples.
        bytes_before: size of the original's weights.
    """

    effects: tuple[ComponentEffect, ...]
    source: str
    measured: int
    calibrated: int
    positions: int
    bytes_before: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN, the standard error of one sample, stays NaN."""
        return asdict(self)


def component_effects(
    model: PathLike,
    images: Any,
    *,
    config: QuantConfig | None = None,
    samples: int = 128,
    measured: int = 16,
    plugin: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    tokenizer: Any = None,
    manager: PluginManager | None = None,
    progress: Callable[[Any], None] | None = None,
) -> ComponentEffects:
    """Quantize one component after the other and measure each against the original, on prompts with images.

    Args:
        model: local folder or hub name of an unquantized model. One copy of it at a time is in memory, and one, in
            which a component is quantized, on the disk that holds temporary files (`TMPDIR`).
        images: samples with images and text, as for `quantize`: a folder, a dataset, a list.
        config: settings; default `QuantConfig()`. Components that it keeps are left out.
        samples: calibrate on so many.
        measured: measure on so many others; at most half of what there is.
        plugin, device, dtype, trust_remote_code, manager: as for `quantize`.
        tokenizer: replaces the model folder's own processor.
        progress: called with `Phase` values, and with the events of each `quantize`.

    Raises:
        CalibrationError: the samples have no images, or there are fewer than two of them.
        ConfigError: the configuration quantizes the output head, or keeps every component.
        AwqError: see `quantize`.
    """
    config, manager, say = config or QuantConfig(), manager or default_manager(), progress or (lambda event: None)
    if config.lm_head:
        raise ConfigError("the output head is no component", hint="leave lm_head out, it would be in every result")
    if measured < 1:
        raise ConfigError(f"measured={measured} is not possible", hint="at least 1")
    folder = resolve(model)
    planned = partial(plan, folder, plugin=plugin, trust_remote_code=trust_remote_code, manager=manager)
    defaults = {policy.component: policy.action for policy in planned(config=replace(config, components={})).policies}
    if unknown := next((name for name in config.components if name not in defaults), None):
        raise ConfigError(f"the model has no component {unknown!r}", hint=f"it has: {', '.join(defaults)}")
    wanted = [name for name in defaults if config.components.get(name) != "keep"]
    if not wanted:
        raise ConfigError("every component is kept", hint=f"quantize one of {', '.join(defaults)}")
    alone = {name: replace(config, components={one: "keep" for one in defaults} | {name: "4bit"}) for name in wanted}
    plans = {name: planned(config=alone[name]) for name in wanted}
    given: dict[str, Any] = {"plugin": plugin, "trust_remote_code": trust_remote_code, "manager": manager}
    data = caption_batches(folder, images, samples=samples + measured, seed=config.seed, processor=tokenizer, **given)
    calibration, held_out = split(data, measured)
    run = {"device": device, **given}
    say(Phase(f"the original on {len(held_out)} samples, to compare with"))
    reference = text_logits(load(folder, **run), held_out)

    def effect(name: str) -> ComponentEffect:
        """The component quantized, loaded and compared; the reason where no sample reaches it."""
        one = describe(name, defaults[name], plans[name])
        if one.reason:
            return one
        say(Phase(f"{name}: {one.linears} linears"))
        with TemporaryDirectory(prefix="awq-component-") as scratch:
            out = Path(scratch) / "out"
            try:
                quantize(folder, out, config=alone[name], calibration=calibration, dtype=dtype, progress=say, **run)
            except CalibrationError as error:
                return replace(one, reason=error.message)
            apart = sample_divergence(reference, text_logits(load(out, fake_quant=True, **run), held_out))
        return replace(one, kl=apart.kl, agreement=apart.agreement)

    return ComponentEffects(
        effects=tuple(effect(name) for name in wanted),
        source=data.source,
        measured=len(held_out),
        calibrated=calibration.samples,
        positions=sum(map(len, reference)),
        bytes_before=plans[wanted[0]].bytes_before,
    )


def split(data: CalibrationData, measured: int) -> tuple[CalibrationData, tuple[dict[str, torch.Tensor], ...]]:
    """Samples to calibrate on, and the last `measured`, at most half of them, to measure on.

    Raises:
        CalibrationError: fewer than two samples.
    """
    batches = data.batches
    if len(batches) < 2:
        raise CalibrationError(
            f"{data.source} holds one sample; one is calibrated on, others are measured on", hint="add some"
        )
    held = min(measured, len(batches) // 2)
    kept = batches[:-held]
    tokens = sum(batch["input_ids"].numel() for batch in kept)
    return replace(data, batches=kept, samples=len(kept), tokens=tokens, notes=()), batches[-held:]


def describe(name: str, default: str, planned: Plan) -> ComponentEffect:
    """A component before it is measured, with the reason where none of its linears can be quantized."""
    linears = sum(linear.quantize for linear in planned.linears)
    reasons = [one.reason for block in planned.blocks if block.component == name for one in block.linears]
    why = "" if linears else next(filter(None, reasons), "it has no linears")
    return ComponentEffect(name, default, linears, planned.bytes_before - planned.bytes_after, reason=why)
