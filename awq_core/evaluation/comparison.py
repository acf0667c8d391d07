"""Which of two quantized models is closer to the one they were made of, with error bars.

The three models run on the same windows of text, one window after another. For each window there is one number of each
quantity and model: loss, KL(original ‖ quantized), share of likeliest tokens that agree. `awq_core.evaluation.paired`
turns them into means and into a difference with its standard error. On the first few windows each block is measured too
(`awq_core.evaluation.blocks`).

All three models are in memory together, with the logits of one window of each: a window's log-probabilities are
window · vocabulary numbers, 512 x 150,000 in bf16 is 154 MB, too much to keep for every window.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from awq_core.errors import ConfigError, NumericsError
from awq_core.evaluation.blocks import BlockError, BlockErrors
from awq_core.evaluation.divergence import compare_logits
from awq_core.evaluation.paired import Estimate, Pair, estimate, paired, perplexities
from awq_core.evaluation.perplexity import (
    Progress,
    Text,
    evaluating,
    fitting_window,
    logits_of,
    token_windows,
    window_loss,
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A and B beside their original.

    Attributes:
        original: perplexity of the original.
        perplexity: of A and B, over these windows.
        kl: mean KL(original ‖ A) and KL(original ‖ B), nats a token.
        agreement: share of positions where the likeliest token is the original's.
        blocks: relative output error of each block that ran.
        tokens: positions compared: windows · window.
        windows: how many.
        window: tokens each.
        block_windows: windows that `blocks` was measured on.
    """

    original: Estimate
    perplexity: Pair
    kl: Pair
    agreement: Pair
    blocks: tuple[BlockError, ...]
    tokens: int
    windows: int
    window: int
    block_windows: int

    @property
    def closer(self) -> str | None:
        """ "a" or "b", whichever has the smaller KL; None where they cannot be told apart."""
        if not self.kl.apart:
            return None
        return "a" if self.kl.difference.mean < 0 else "b"

    def to_dict(self) -> dict[str, Any]:
        """Plain values; NaN stays NaN."""
        pairs = {name: getattr(self, name).to_dict() for name in ("perplexity", "kl", "agreement")}
        return {**asdict(self), **pairs, "closer": self.closer}


def compare_models(
    original: Any,
    a: Any,
    b: Any,
    tokenizer: Any,
    text: Text,
    *,
    window: int = 512,
    max_windows: int | None = None,
    block_windows: int = 4,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two quantized models with the original, window by window.

    Args:
        original: the unquantized model; all three are called with `input_ids` `[1, window]`.
        a, b: the quantized models, on the device of the original.
        tokenizer: the one of all three.
        text: the text itself, or a calibration source, as in `perplexity`.
        window: tokens a window, never more than the shortest context of the three; windows do not overlap.
        max_windows: stop after so many.
        block_windows: measure blocks on the first so many; 0 leaves them out.
        progress: called with (windows done, windows in all) after each.

    Raises:
        CalibrationError: the text cannot be read, or has fewer than two tokens.
        ConfigError: the models' vocabularies or blocks differ; an impossible window, max_windows or block_windows.
        NumericsError: NaN or inf in a loss or a divergence.
    """
    if block_windows < 0:
        raise ConfigError(f"block_windows={block_windows} is not possible", hint="0 measures no blocks")
    limit = fitting_window(window, original, a, b)
    windows = token_windows(tokenizer, text, window=limit, max_windows=max_windows)
    watcher = BlockErrors(original, a, b)
    rows: list[list[float]] = []
    with evaluating(original, a, b):
        for number, ids in enumerate(windows):
            with watcher.watching() if number < block_windows else nullcontext():
                right = logits_of(original, ids)
            row = [window_loss(right, ids)]
            for model in (a, b):
                logits = logits_of(model, ids)
                kl, top1, _ = compare_logits(right, logits)
                row += [window_loss(logits, ids), float(kl.mean()), float(top1.mean())]
            rows.append(row)
            if not bool(torch.tensor(row).isfinite().all()):
                raise NumericsError(f"a loss in window {number} is not finite", hint="try bfloat16 or float32")
            if progress:
                progress(number + 1, len(windows))
    nll, nll_a, kl_a, top_a, nll_b, kl_b, top_b = torch.tensor(rows, dtype=torch.float64).T
    count, length = windows.shape
    return Comparison(
        original=estimate(perplexities(nll)),
        perplexity=paired(perplexities(nll_a), perplexities(nll_b)),
        kl=paired(kl_a, kl_b),
        agreement=paired(top_a, top_b),
        blocks=watcher.results(),
        tokens=count * length,
        windows=count,
        window=length,
        block_windows=min(block_windows, count),
    )
