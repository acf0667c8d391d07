"""What a model predicts on prompts with images, and how far two models are apart there, sample by sample.

Most tokens of such a prompt stand for pieces of an image, and what a model predicts in their place is never used. So
only the positions count that predict text: those whose next token is no such placeholder, and the last, where
generation would begin. With T_s these positions of sample s, and p and q the two models' distributions there,

    kl_s = mean_{t in T_s} KL(p_t ‖ q_t)        result = mean_s kl_s ± std_s kl_s / √n

The loss is that of the positions with a next token, x_{t+1}:

    nll_s = mean_{t in T_s} -log p_t(x_{t+1})

Each sample weighs the same, as each window does in `compare_models`. The logits of the first model at these positions
are kept, positions · vocabulary numbers a sample, so that both models need not be in memory together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from awq_core.errors import ConfigError, NumericsError
from awq_core.evaluation.divergence import compare_logits
from awq_core.evaluation.paired import Estimate, estimate
from awq_core.evaluation.perplexity import evaluating, summed_loss

Batch = Mapping[str, torch.Tensor]

# What configurations call the tokens that stand for an image, a video or a sound: "image_token_id", "image_patch_id".
PLACEHOLDER = re.compile(r"(image|video|audio)_(\w+_)?(id|index)")
# The next token where there is none: at the end, and before padding.
NOTHING = -1


@dataclass(frozen=True, slots=True)
class SampleDivergence:
    """Divergence over samples.

    Attributes:
        kl: KL(reference ‖ candidate), nats a token.
        agreement: share of positions where both give the same token the highest logit.
        samples: how many.
        positions: positions compared, of all samples.
    """

    kl: Estimate
    agreement: Estimate
    samples: int
    positions: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN stays NaN."""
        return asdict(self)


def placeholder_ids(config: Any) -> frozenset[int]:
    """Ids of the tokens that stand for something other than text, as a transformers configuration names them."""
    found: set[int] = set()

    def look(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                look(value)
            elif isinstance(value, int) and PLACEHOLDER.fullmatch(name):
                found.add(value)

    look(config.to_dict())
    return frozenset(found)


def predicts_text(batch: Batch, placeholders: frozenset[int]) -> torch.Tensor:
    """Which positions of a batch count: `[batch, tokens]` bool.

    Args:
        batch: "input_ids" `[batch, tokens]`, and "attention_mask" of that shape where there is padding.
    """
    after, real = _next_tokens(batch)
    return real & ~torch.isin(after, torch.tensor(sorted(placeholders), dtype=after.dtype))


def text_targets(batch: Batch, placeholders: frozenset[int]) -> torch.Tensor:
    """The token after each position that counts, `[positions]` as in `text_logits`; `NOTHING` where there is none."""
    return _next_tokens(batch)[0][predicts_text(batch, placeholders)]


def sample_loss(logits: torch.Tensor, targets: torch.Tensor, number: int = 0) -> float:
    """Mean loss of one sample, nats a token.

    Args:
        logits: its `text_logits`, `[positions, vocabulary]`.
        targets: its `text_targets`, `[positions]`.
        number: what errors call it.

    Raises:
        ConfigError: no position has a next token.
        NumericsError: the loss is NaN or inf.
    """
    scored = targets != NOTHING
    if not bool(scored.any()):
        raise ConfigError(f"sample {number} has no text to predict", hint="give images with captions")
    loss = summed_loss(logits[scored], targets[scored]) / int(scored.sum())
    if not math.isfinite(loss):
        raise NumericsError(f"the loss in sample {number} is not finite", hint="try bfloat16 or float32")
    return loss


def text_logits(model: Any, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """A model's logits where samples predict text, `[positions, vocabulary]` of each sample, on CPU.

    Args:
        model: called with the tensors of each batch, moved to its device, and floating ones to its dtype.
        batches: one a sample, as `multimodal_batches` makes them.
    """
    placeholders = placeholder_ids(model.config)
    found = []
    with evaluating(model):
        for batch in batches:
            given = {name: _like(model, value) for name, value in batch.items() if name != "labels"}
            logits = model(**given, use_cache=False).logits
            found.append(logits[predicts_text(batch, placeholders).to(logits.device)].cpu())
    return found


def sample_divergence(reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> SampleDivergence:
    """KL divergence and agreement of two models, from their `text_logits` on the same samples.

    Raises:
        ConfigError: their numbers of samples or positions, or their vocabularies, differ.
        NumericsError: NaN or inf in the divergence.
    """
    if not reference or len(reference) != len(candidate):
        raise ConfigError(
            f"{len(reference)} and {len(candidate)} samples cannot be compared", hint="give both the same samples"
        )
    pairs = zip(reference, candidate, strict=True)
    kl, agreement = torch.stack([compare_sample(*pair, number) for number, pair in enumerate(pairs)], dim=1)
    return SampleDivergence(estimate(kl), estimate(agreement), len(kl), sum(map(len, reference)))


def compare_sample(reference: torch.Tensor, candidate: torch.Tensor, number: int = 0) -> torch.Tensor:
    """Mean KL and agreement of one sample, `[2]` fp64, from logits `[positions, vocabulary]`.

    Args:
        number: what errors call the sample.

    Raises:
        ConfigError, NumericsError: see `sample_divergence`.
    """
    if len(reference) != len(candidate) or not len(reference):
        raise ConfigError(
            f"sample {number} has {len(reference)} and {len(candidate)} positions to compare",
            hint="give both the same samples, with text in each",
        )
    mean = compare_logits(reference, candidate).mean(1)[:2]
    if not bool(mean.isfinite().all()):
        raise NumericsError(f"the divergence in sample {number} is not finite", hint="try bfloat16 or float32")
    return mean


def _next_tokens(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The token after each, and which positions are no padding: both `[batch, tokens]`, on CPU."""
    ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
    real = mask.cpu().bool() if mask is not None and mask.shape == ids.shape else torch.ones_like(ids).bool()
    after = torch.full_like(ids, NOTHING)
    after[:, :-1] = ids[:, 1:].where(real[:, 1:], NOTHING)
    return after, real


def _like(model: Any, value: torch.Tensor) -> torch.Tensor:
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
