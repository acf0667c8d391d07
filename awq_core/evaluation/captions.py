"""Perplexity of captions given their images, and what quantization changed of it.

A batch holds an image and text about it, as the model's plugin makes it for calibration. With nll_s the mean loss of
sample s at the positions that predict text (`awq_core.evaluation.samples`), and n samples,

    perplexity = exp(m),  m = mean_s nll_s        standard error = exp(m) · std_s nll_s / √n

and beside the original, at the same positions: its perplexity, the difference from it sample by sample, the KL
divergence and the agreement of likeliest tokens. What a quantized vision tower or projector costs shows here and
not on text, which does not reach them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.prepare import Preprocessors, prepare
from awq_core.errors import CalibrationError, ConfigError
from awq_core.evaluation.paired import Estimate, estimate, paired, perplexities
from awq_core.evaluation.perplexity import Progress
from awq_core.evaluation.samples import (
    NOTHING,
    Batch,
    compare_sample,
    placeholder_ids,
    sample_loss,
    text_logits,
    text_targets,
)
from awq_core.hooks.manager import PluginManager, default_manager
from awq_core.model_folder import open_config


@dataclass(frozen=True, slots=True)
class CaptionDistance:
    """A model beside its original, on the same samples.

    Attributes:
        perplexity: the original's.
        difference: the model's perplexity minus the original's, sample by sample.
        kl: KL(original ‖ model), nats a token.
        agreement: share of positions where both give the same token the highest logit.
    """

    perplexity: Estimate
    difference: Estimate
    kl: Estimate
    agreement: Estimate


@dataclass(frozen=True, slots=True)
class CaptionResult:
    """Perplexity over samples with images.

    Attributes:
        perplexity: exponential of the mean loss; each sample weighs the same.
        loss: nats a token.
        samples: how many.
        tokens: text tokens predicted, of all samples.
        against: what the original gives; None without one.
    """

    perplexity: Estimate
    loss: Estimate
    samples: int
    tokens: int
    against: CaptionDistance | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN, the standard error of one sample, stays NaN."""
        return asdict(self)


def caption_batches(
    folder: Path,
    source: Any,
    *,
    samples: int,
    seed: int = 0,
    plugin: str | None = None,
    trust_remote_code: bool = False,
    processor: Any = None,
    manager: PluginManager | None = None,
) -> CalibrationData:
    """Samples with images as batches, made by the model's processor and its plugin's `awq_calibration_batch`.

    Args:
        folder: of the model.
        source: as for `quantize`: a folder of images, a file of messages, a dataset, a list.
        samples: at most so many, in an order that `seed` draws.
        processor: replaces the folder's own.

    Raises:
        CalibrationError: the source cannot be read, or holds no images.
        UnsupportedModelError, PluginConflictError, ConfigError, PluginError: see `open_config`.
    """
    manager = manager or default_manager()
    _, owner = open_config(folder, manager, plugin=plugin, trust_remote_code=trust_remote_code)
    data = prepare(
        source,
        Preprocessors(folder, processor, trust_remote_code),
        partial(manager.calibration_batch, owner),
        samples=samples,
        seq_len=1,  # text alone is refused below, however short
        seed=seed,
        vocab_size=None,
    )
    if not any(value.is_floating_point() for batch in data.batches for value in batch.values()):
        raise CalibrationError(f"{data.source} holds no images", hint="give a folder of images with captions")
    return data


def caption_perplexity(
    model: Any, batches: Sequence[Batch], *, reference: Any = None, progress: Progress | None = None
) -> CaptionResult:
    """Perplexity of the text tokens of samples, given their images and the text before them.

    Args:
        model: called with the tensors of each batch; it may be on another device than the reference.
        batches: one a sample, such as `caption_batches(...).batches`.
        reference: the original model, to compare with.
        progress: called with (samples done, samples in all) after each.

    Raises:
        ConfigError: no samples, or one without text to predict; the vocabularies differ.
        NumericsError: NaN or inf in a loss or a divergence.
    """
    if not batches:
        raise ConfigError("there are no samples to measure on", hint="give images with captions")
    placeholders = placeholder_ids(model.config)
    mine, theirs, apart, tokens = list[float](), list[float](), list[torch.Tensor](), 0
    for number, batch in enumerate(batches):
        targets = text_targets(batch, placeholders)
        scored = targets != NOTHING
        (logits,) = text_logits(model, [batch])
        mine.append(sample_loss(logits, targets, number))
        tokens += int(scored.sum())
        if reference is not None:
            (right,) = text_logits(reference, [batch])
            theirs.append(sample_loss(right, targets, number))
            apart.append(compare_sample(right[scored], logits[scored], number))
        if progress:
            progress(number + 1, len(batches))
    loss = torch.tensor(mine, dtype=torch.float64)
    against = None
    if reference is not None:
        pair = paired(perplexities(loss), perplexities(torch.tensor(theirs, dtype=torch.float64)))
        kl, agreement = torch.stack(apart, dim=1)
        against = CaptionDistance(pair.b, pair.difference, estimate(kl), estimate(agreement))
    return CaptionResult(estimate(perplexities(loss)), estimate(loss), len(mine), tokens, against)
