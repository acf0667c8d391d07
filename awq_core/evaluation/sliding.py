"""Perplexity by a sliding window: what the model makes of a text it reads with a long memory.

Windows that do not overlap begin without context, over and over. Here a window of L tokens moves on by S tokens (the
stride), and only tokens that no earlier window has scored are scored: with w(t) the window of token t,

    nll = (1/(T-1)) Σ_{t=2..T} -log p(x_t | x_{first of w(t)} .. x_{t-1}),        perplexity = exp(nll)

Every token but the first counts once, and from the second window on each has at least L - S tokens before it. So the
number is lower than that of the papers' protocol on the same text, and the two are not to be compared. It costs L/S
times as much. Source: transformers' page on perplexity of fixed-length models.
"""

from __future__ import annotations

import math
from typing import Any

from awq_core.errors import ConfigError, NumericsError
from awq_core.evaluation.perplexity import (
    STANDARD_WINDOW,
    PerplexityResult,
    Progress,
    Text,
    evaluating,
    exponential,
    fitting_window,
    logits_of,
    summed_loss,
    token_ids,
)


def sliding_perplexity(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    window: int | None = None,
    stride: int = 512,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity with a window that moves `stride` tokens at a time.

    Args:
        model, tokenizer, text, max_windows, progress: as in `perplexity`.
        window: tokens a window; 2048 by default, and never more than the model's context.
        stride: tokens it moves on, less than `window`.

    Raises:
        CalibrationError: the text cannot be read, or has fewer than two tokens.
        ConfigError: an impossible window, stride or max_windows.
        NumericsError: NaN or inf in the loss.
    """
    limit = fitting_window(STANDARD_WINDOW if window is None else window, model)
    if limit < 2:
        raise ConfigError(f"window={limit} is not possible", hint="at least 2")
    if not 1 <= stride < limit:  # a token that a window scores needs one before it in there
        raise ConfigError(f"stride={stride} is not possible in windows of {limit} tokens", hint=f"1 to {limit - 1}")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} is not possible", hint="at least 1")
    ids = token_ids(tokenizer, text)
    spans = _spans(len(ids), limit, stride)
    used = spans[:max_windows]
    total, scored = 0.0, 0
    with evaluating(model):
        for number, (start, first, end) in enumerate(used):
            logits = logits_of(model, ids[start:end])
            # The logits at position i predict token i + 1.
            loss = summed_loss(logits[first - start - 1 : -1], ids[first:end])
            if not math.isfinite(loss):
                raise NumericsError(f"the loss of window {number} is {loss}", hint="try bfloat16 or float32")
            total += loss
            scored += end - first
            if progress:
                progress(number + 1, len(used))
    nll = total / scored
    part_of = "the first " if len(used) < len(spans) else ""
    protocol = (
        f"{part_of}{len(used)} sliding windows of {limit} tokens, stride {stride}, each token scored once, "
        "mean over tokens"
    )
    return PerplexityResult(exponential(nll), nll, scored, len(used), limit, protocol)


def _spans(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(first token of the window, first token it scores, end) of each window; the last one ends with the text."""
    spans = []
    scored = 1  # nothing comes before the first token
    for start in range(0, tokens, stride):
        end = min(start + window, tokens)
        if end > scored:
            spans.append((start, scored, end))
            scored = end
        if end == tokens:
            break
    return spans
