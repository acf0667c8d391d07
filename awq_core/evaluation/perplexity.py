"""Perplexity, by the protocol of the GPTQ and AWQ papers, so that numbers can be compared with theirs.

The whole text is tokenized in one call with the tokenizer's default special tokens, and cut into n windows of L tokens
that do not overlap; the tail is dropped. With p the model's probability of a token given those before it in its window,

    nll = (1/n) Σ_windows (1/(L-1)) Σ_{t=2..L} -log p(x_t | x_1 .. x_{t-1}),        perplexity = exp(nll)

L is 2048, or the model's context where that is shorter. WikiText-2's number is `perplexity(model, tokenizer,
read_text("wikitext2", split="test"))`: empty rows are kept, as in the papers. C4's needs windows of another kind
(`awq_core.evaluation.c4`); a sliding window answers another question (`awq_core.evaluation.sliding`).

Logits stay in the model's dtype; they are taken to fp32 a few hundred positions at a time, since fp32 logits of a
window of 2048 and a vocabulary of 150,000 would be more than a gigabyte.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch

from awq_core.calibration.sources import DATA_SUFFIXES, read_text
from awq_core.errors import CalibrationError, ConfigError, NumericsError

Text: TypeAlias = "str | os.PathLike[str] | Iterable[Any]"
Progress: TypeAlias = Callable[[int, int], None]

STANDARD_WINDOW = 2048
CHUNK = 256
# What configurations call the longest input of a model.
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and how it was measured.

    Attributes:
        perplexity: exp(nll).
        nll: nats a token, mean over windows.
        tokens: tokens that were predicted: windows · (window - 1).
        windows: how many.
        window: tokens each.
        protocol: the measurement in words.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    window: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a causal language model on a text.

    Args:
        model: called with `input_ids` `[1, window]`; its `.logits` are `[1, window, vocabulary]`.
        tokenizer: the model's own.
        text: the text itself, or a calibration source: a path, a list of documents (joined by a blank line).
        window: tokens a window; 2048 by default, and never more than the model's context. A text shorter than one
            window is scored as one short window.
        max_windows: stop after so many.
        progress: called with (windows done, windows in all) after each.

    Raises:
        CalibrationError: the text cannot be read, or has fewer than two tokens.
        ConfigError: a window of fewer than two tokens, or max_windows below one.
        NumericsError: NaN or inf in the loss.
    """
    limit = fitting_window(STANDARD_WINDOW if window is None else window, model)
    windows = token_windows(tokenizer, text, window=limit, max_windows=max_windows)
    count, length = windows.shape
    part_of = "the first " if max_windows is not None and count == max_windows else ""
    protocol = f"{part_of}{count} non-overlapping windows of {length} tokens, mean over windows, tail dropped"
    if length < limit:
        protocol = f"one window of {length} tokens, the whole text"
    return windows_perplexity(model, windows, protocol, progress)


def windows_perplexity(
    model: Any, windows: torch.Tensor, protocol: str, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity over ready windows `[windows, window]` of token ids, each of which counts the same.

    Raises: NumericsError, as `perplexity`.
    """
    total = 0.0
    with evaluating(model):
        for number, ids in enumerate(windows):
            loss = window_loss(logits_of(model, ids), ids)
            if not math.isfinite(loss):
                raise NumericsError(f"the loss of window {number} is {loss}", hint="try bfloat16 or float32")
            total += loss
            if progress:
                progress(number + 1, len(windows))
    count, length = windows.shape
    nll = total / count
    return PerplexityResult(exponential(nll), nll, count * (length - 1), count, length, protocol)


def exponential(nll: float) -> float:
    """exp(nll), infinite where it is too large for a float."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def window_loss(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean loss, nats a token, of the ids `[tokens]` of one window but the first, given its logits."""
    return summed_loss(logits[:-1], ids[1:]) / (len(ids) - 1)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum over positions of -log p(target), nats, of logits `[tokens, vocabulary]` and their targets `[tokens]`."""
    loss = 0.0
    for part, target in zip(logits.split(CHUNK), targets.to(logits.device).split(CHUNK), strict=True):
        log_p = part.float().log_softmax(-1)
        loss -= float(log_p.gather(-1, target[:, None]).double().sum())
    return loss


def fitting_window(wanted: int, *models: Any) -> int:
    """The window wanted, cut to the shortest context of the models; a configuration that names none sets no limit."""
    limits = [wanted]
    for model in models:
        config: Any = getattr(model, "config", None)
        if hasattr(config, "get_text_config"):  # a vision-language model names its context in the part for text
            config = config.get_text_config()
        values = (getattr(config, name, None) for name in CONTEXT_FIELDS)
        limits += [value for value in values if isinstance(value, int) and value > 0][:1]
    return min(limits)


def token_windows(tokenizer: Any, text: Text, *, window: int, max_windows: int | None) -> torch.Tensor:
    """The text's tokens, cut: `[windows, window]` int64, or `[1, tokens]` for a text shorter than one window.

    Raises: CalibrationError and ConfigError, as `perplexity`.
    """
    if window < 2:
        raise ConfigError(f"window={window} is not possible", hint="at least 2")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} is not possible", hint="at least 1")
    ids = token_ids(tokenizer, text)
    count = len(ids) // window
    if not count:
        return ids[None]
    return ids[: count * window].view(count, window)[:max_windows]


def token_ids(tokenizer: Any, text: Text) -> torch.Tensor:
    """The whole text in one call of the tokenizer: `[tokens]` int64.

    Raises: CalibrationError, as `perplexity`.
    """
    # `verbose` would warn that the text is longer than the model's context, which is what windows are for.
    ids = torch.tensor(tokenizer(_read(text), verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < 2:
        raise CalibrationError(f"the text has {len(ids)} tokens; at least 2 are needed", hint="give a longer text")
    return ids


def _read(text: Text) -> str:
    if not isinstance(text, str):
        return read_text(text)
    # A name that is no file but ends like one is a typing error, not a text of one word.
    names_file = text.lower().endswith(DATA_SUFFIXES) and not any(letter.isspace() for letter in text)
    return read_text(text) if names_file or (text and os.path.exists(text)) else text


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Dropout off and no gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of one window of ids `[tokens]`, in the model's dtype and on its device."""
    device = getattr(model, "device", None) or next(model.parameters()).device
    logits: torch.Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
    return logits
