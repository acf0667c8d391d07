"""How far a quantized model's predictions are from the original's, token by token on the same text.

With p and q the two models' next-token distributions after the same tokens,

    KL(p ‖ q) = Σ_v p(v) · (log p(v) − log q(v))        nats per token, never negative, 0 only where p = q

Perplexity compares two sums in which errors of opposite sign cancel; a divergence has no such cancellation and needs no
labels, so it tells close models apart on far less text. Its mean is dominated by few positions, hence the median and
the 99.9th percentile beside it. Agreement asks what greedy decoding would notice: is the likeliest token the same?
Intervals are 95 % ones, over windows (`awq_core.evaluation.intervals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from awq_core.errors import ConfigError, NumericsError
from awq_core.evaluation.intervals import Interval, bootstrap, p999, quantile
from awq_core.evaluation.perplexity import CHUNK, Progress, Text, evaluating, fitting_window, logits_of, token_windows
from awq_core.evaluation.reference import ReferenceLogits

TOP = 5


@dataclass(frozen=True)
class DivergenceResult:
    """Divergence of a candidate from a reference; every position of every window counts.

    Attributes:
        kl_mean: mean KL(reference ‖ candidate), nats a token.
        kl_stderr: standard error of that mean, from the spread between windows; NaN with one window.
        kl_median: of all positions.
        kl_p999: 99.9th percentile of all positions.
        top1_agreement: share of positions where both give the same token the highest logit.
        top5_agreement: mean over positions of |top5(reference) ∩ top5(candidate)| / 5.
        tokens: positions compared: windows · window.
        windows: how many.
        window: tokens each.
        intervals: 95 % interval of kl_mean, kl_p999, top1_agreement and top5_agreement; empty with one window.
    """

    kl_mean: float
    kl_stderr: float
    kl_median: float
    kl_p999: float
    top1_agreement: float
    top5_agreement: float
    tokens: int
    windows: int
    window: int
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: NaN, which JSON does not have, becomes None."""
        values = asdict(self) | {"intervals": {name: list(ends) for name, ends in self.intervals.items()}}
        return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def divergence(
    reference: Any,
    candidate: Any,
    tokenizer: Any,
    text: Text,
    *,
    window: int = 512,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """KL divergence and agreement of `candidate` with `reference`.

    Args:
        reference: the original model; called with `input_ids` `[1, window]`, as is the candidate. Or
            `ReferenceLogits`, its logits on disk.
        candidate: the quantized model; it may be on another device.
        tokenizer: the one of both.
        text: the text itself, or a calibration source, as in `perplexity`.
        window: tokens a window, never more than the shorter context of the two; windows do not overlap.
        max_windows: stop after so many.
        progress: called with (windows done, windows in all) after each.

    Raises:
        CalibrationError: the text cannot be read, or has fewer than two tokens.
        ConfigError: the models' vocabularies differ; an impossible window or max_windows.
        NumericsError: NaN or inf in the divergence.
    """
    kept = reference if isinstance(reference, ReferenceLogits) else None
    models = (candidate,) if kept else (reference, candidate)
    windows = token_windows(tokenizer, text, window=fitting_window(window, *models), max_windows=max_windows)
    if kept:
        kept.begin(windows)
    rows = []
    with evaluating(*models):
        for number, ids in enumerate(windows):
            right = kept.logits(number, ids, len(windows)) if kept else logits_of(reference, ids)
            rows.append(compare_logits(right, logits_of(candidate, ids)))
            if not bool(rows[-1].isfinite().all()):
                raise NumericsError(f"the divergence in window {number} is not finite", hint="try bfloat16 or float32")
            if progress:
                progress(number + 1, len(windows))
    kl, top1, top5 = torch.stack(rows, dim=1)  # each [windows, window]
    count, length = kl.shape
    spread = float(kl.mean(1).std()) if count > 1 else math.nan
    found = {
        "kl_mean": bootstrap(kl.mean(1)),
        "kl_p999": bootstrap(kl, p999),
        "top1_agreement": bootstrap(top1.mean(1)),
        "top5_agreement": bootstrap(top5.mean(1)),
    }
    return DivergenceResult(
        kl_mean=float(kl.mean()),
        kl_stderr=spread / math.sqrt(count),
        kl_median=float(quantile(kl, 0.5)),
        kl_p999=float(quantile(kl, 0.999)),
        top1_agreement=float(top1.mean()),
        top5_agreement=float(top5.mean()),
        tokens=count * length,
        windows=count,
        window=length,
        intervals={name: ends for name, ends in found.items() if ends},
    )


def compare_logits(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL, top-1 and top-5 agreement at each position of logits `[tokens, vocabulary]`: `[3, tokens]` fp64, on CPU.

    Raises: ConfigError where the vocabularies differ.
    """
    if reference.shape != candidate.shape:
        raise ConfigError(
            f"the models' vocabularies differ: {reference.shape[-1]} and {candidate.shape[-1]} logits",
            hint="compare a model with the one it was made of",
        )
    parts = []
    for mine, other in zip(reference.split(CHUNK), candidate.split(CHUNK), strict=True):
        logits_p, logits_q = mine.float(), other.to(mine.device).float()
        log_p, log_q = logits_p.log_softmax(-1), logits_q.log_softmax(-1)
        p = log_p.exp()
        # Some models mask unused tokens with -inf: p = 0 contributes nothing, though log p - log q is NaN there.
        kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_min(0.0)
        top_p, top_q = (logits.topk(min(TOP, logits.shape[-1])).indices for logits in (logits_p, logits_q))
        shared = (top_p[:, :, None] == top_q[:, None, :]).any(-1).double().mean(-1)
        same = (logits_p.argmax(-1) == logits_q.argmax(-1)).double()
        parts.append(torch.stack([kl.double(), same, shared]).cpu())
    return torch.cat(parts, dim=1)
