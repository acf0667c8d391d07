"""Samples as batches of tokens.

Text: every document is tokenized with the tokenizer's own special tokens, so a beginning-of-text token opens each where
the model expects one; the documents form one stream, cut into windows that do not overlap,

    | bos doc 1 ........ | ... bos doc 2 . | bos doc 3 bos doc 4 | ...        each `seq_len` tokens

No document is discarded for being long and none is padded, so every token of every window counts in the statistics.
At most `POOL` times the windows asked for are read, and the ones to keep are drawn from them.

Images: the model's plugin turns one sample into one batch, since how pictures become tokens is the model's business.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from awq_core.calibration.formats import Sample, first_line, sample_text, to_sample
from awq_core.calibration.sources import GIVEN
from awq_core.calibration.subsets import SUBSET
from awq_core.errors import CalibrationError, ConfigError

POOL = 4


@dataclass(frozen=True, eq=False)
class CalibrationData:
    """What a model is calibrated on.

    Attributes:
        batches: keyword arguments of the model's `forward`, in order; "input_ids" is `[batch, tokens]` int64.
        source: where the samples came from, for model cards.
        samples: windows of text, or samples with images.
        tokens: tokens in all batches, without padding.
        notes: what the user should know: fewer samples than asked for, chats the template refused, images left out.
        mixture: (subset, tokens) of what is used, where the source names subsets (The Pile's `meta.pile_set_name`).
    """

    batches: tuple[dict[str, torch.Tensor], ...]
    source: str
    samples: int
    tokens: int
    notes: tuple[str, ...] = ()
    mixture: tuple[tuple[str, int], ...] = ()


def text_batches(
    samples: Iterable[Any],
    tokenizer: Any,
    *,
    n_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    vocab_size: int | None = None,
    description: str = GIVEN,
) -> CalibrationData:
    """Windows of `seq_len` tokens; the same ones for the same samples, tokenizer and seed.

    Args:
        samples: from `read_samples`, or strings, chats, lists of token ids. Read only as far as needed.
        tokenizer: the model's own; None will do where every sample is token ids.
        n_samples: windows wanted. Fewer are used, with a note, where the text holds no more.
        seq_len: tokens a window.
        batch_size: windows a batch; the last batch may have fewer.
        seed: draws the windows.
        vocab_size: rows of the model's embedding; token ids beyond it are refused.
        description: the source's name, for the result and for errors.

    Returns:
        `CalibrationData` whose batches hold "input_ids" `[batch_size, seq_len]` int64 and nothing else: windows have
        no padding.

    Raises:
        CalibrationError: less than one window of tokens, a token id the model does not have, no tokenizer.
        ConfigError: a count that is not positive.
    """
    for name, value in (("n_samples", n_samples), ("seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name}={value} is not possible", hint="at least 1")
    stream, refusals, pictures = array("q"), list[str](), 0
    ends: list[tuple[int, str | None]] = []  # where each document ends in the stream, and its subset
    for number, item in enumerate(samples):
        sample = to_sample(item, f"sample {number}")
        pictures += len(sample.get("images", ()))
        ids = _token_ids(sample, tokenizer, refusals)
        if vocab_size is not None and ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise CalibrationError(
                f"sample {number} of {description} has token id {wrong}, but the model has {vocab_size} tokens",
                hint="use the model's own tokenizer",
            )
        stream.extend(ids)
        ends.append((len(stream), sample.get(SUBSET)))
        if len(stream) >= POOL * n_samples * seq_len:
            break
    available = min(len(stream) // seq_len, POOL * n_samples)
    if not available:
        smaller = f", or a --seq-len of at most {len(stream)}" if len(stream) else ""
        raise CalibrationError(
            f"{description} holds {len(stream)} tokens, one sample needs {seq_len}", hint=f"add text{smaller}"
        )
    windows = torch.tensor(stream[: available * seq_len], dtype=torch.int64).view(available, seq_len)
    chosen = random.Random(seed).sample(range(available), min(n_samples, available))
    notes = []
    if available < n_samples:
        notes.append(f"{available} of the {n_samples} samples asked for: the text holds {len(stream)} tokens")
    if refusals:
        notes.append(f"{len(refusals)} chats were read as plain text: the chat template refused them ({refusals[0]})")
    if pictures:
        notes.append(f"images left out: {pictures}; only the text was read")
    return CalibrationData(
        batches=tuple({"input_ids": batch} for batch in windows[chosen].split(batch_size)),
        source=description,
        samples=len(chosen),
        tokens=len(chosen) * seq_len,
        notes=tuple(notes),
        mixture=_mixture(ends, chosen, seq_len),
    )


def _mixture(ends: list[tuple[int, str | None]], windows: list[int], length: int) -> tuple[tuple[str, int], ...]:
    """Tokens of each subset in the windows; empty where no document names one. `ends` is in order."""
    if not any(subset for _, subset in ends):
        return ()
    counts: Counter[str] = Counter()
    documents = 0
    for window in sorted(windows):
        at, last = window * length, (window + 1) * length
        while at < last:
            while ends[documents][0] <= at:
                documents += 1
            end, subset = ends[documents]
            counts[subset or "no subset"] += min(end, last) - at
            at = min(end, last)
    return tuple(sorted(counts.items()))


def _token_ids(sample: Sample, tokenizer: Any, refusals: list[str]) -> list[int]:
    """Ids of one document, special tokens included; a refused chat is read as text and its reason kept."""
    if "input_ids" in sample:
        return list(sample["input_ids"])
    if tokenizer is None:
        raise CalibrationError("text cannot calibrate a model without its tokenizer", hint="add the tokenizer's files")
    text, rendered = sample_text(sample), False
    if not text.strip():
        return []
    if "messages" in sample and getattr(tokenizer, "chat_template", None):
        try:
            text, rendered = tokenizer.apply_chat_template(sample["messages"], tokenize=False), True
        except Exception as error:  # templates raise what they like: "system role not supported"
            refusals.append(first_line(error))
    # A rendered chat carries its special tokens already. `verbose` warns of documents longer than the model's context.
    return list(tokenizer(text, add_special_tokens=not rendered, verbose=False)["input_ids"])


def multimodal_batches(
    samples: Iterable[Mapping[str, Any]],
    *,
    make_batch: Callable[[Sample], Mapping[str, Any] | None],
    n_samples: int = 128,
    description: str = GIVEN,
) -> CalibrationData:
    """One batch a sample, made by the model's plugin, of the first `n_samples`.

    Args:
        samples: from `read_samples`: "text" or "messages", and "images".
        make_batch: from a sample to the model's keyword arguments; called with "images" present, if empty.
        n_samples: samples wanted; fewer are used, with a note, where there are no more.
        description: the source's name, for the result and for errors.

    Returns:
        `CalibrationData` with every tensor that `make_batch` gave, "attention_mask" included.

    Raises:
        CalibrationError: no samples, or a batch that is no mapping of tensors.
        ConfigError: `n_samples` is not positive.
    """
    if n_samples < 1:
        raise ConfigError(f"n_samples={n_samples} is not possible", hint="at least 1")
    batches: list[dict[str, torch.Tensor]] = []
    for number, item in enumerate(samples):
        batch = make_batch({"images": [], **to_sample(item, f"sample {number}")})
        batches.append(_tensors(batch, f"sample {number} of {description}"))
        if len(batches) == n_samples:
            break
    if not batches:
        raise CalibrationError(f"{description} holds no samples", hint="add some")
    short = len(batches) < n_samples
    return CalibrationData(
        batches=tuple(batches),
        source=description,
        samples=len(batches),
        tokens=sum(_count_tokens(batch) for batch in batches),
        notes=(f"{len(batches)} of the {n_samples} samples asked for: there are no more",) if short else (),
    )


def _tensors(batch: Mapping[str, Any] | None, where: str) -> dict[str, torch.Tensor]:
    if not isinstance(batch, Mapping) or not batch:
        raise CalibrationError(f"no model inputs came of {where}", hint="see the plugin's awq_calibration_batch")
    given = {key: value for key, value in batch.items() if value is not None}
    for key, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise CalibrationError(
                f"{where}: input {key!r} is {type(value).__name__}, not a tensor",
                hint='call the processor with return_tensors="pt"',
            )
    return given


def _count_tokens(batch: dict[str, torch.Tensor]) -> int:
    """Tokens that are not padding; 0 for a batch without any, such as pictures alone."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if mask is not None and mask.dim() == 2:
        return int(mask.ne(0).sum())
    return 0 if ids is None else ids.numel()
