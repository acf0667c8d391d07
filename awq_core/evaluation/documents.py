"""Bits per UTF-8 byte, document by document and subset by subset: The Pile's measure.

    bits per byte = Σ_documents Σ_t -log₂ p(x_t | x_<t)  /  Σ_documents bytes of the document's text

Bytes are those of the text itself, not of decoded tokens, so models with different tokenizers can be compared. The
Pile: Gao et al. 2020, arXiv 2101.00027, section 3.1. Documents are scored one by one, as lm-evaluation-harness does it
("rolling" log-likelihood): a document's tokens follow the tokenizer's beginning-of-text token (else its end-of-text
token), a window of L predicts L tokens, and the next begins with the last token of the one before; only the last
window, with fewer left to predict, reaches back to be full. Every token of every document is predicted once. Documents
are read one at a time, so that a file may be larger than memory.

The total weights subsets by their bytes: Σ bits / Σ bytes of all that was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from awq_core.calibration.formats import sample_text
from awq_core.calibration.subsets import SUBSET, Subsets
from awq_core.errors import CalibrationError, ConfigError, NumericsError
from awq_core.evaluation.perplexity import STANDARD_WINDOW, evaluating, fitting_window, logits_of, summed_loss

# Called with (documents done, of how many or None).
DocumentsDone: TypeAlias = Callable[[int, "int | None"], None]


@dataclass(frozen=True, slots=True)
class Bits:
    """What a subset, or all of it, was measured on.

    Attributes:
        bits: Σ -log₂ p over its tokens.
        bytes: of the text, UTF-8.
        tokens: predicted.
        documents: read; empty ones are left out.
    """

    bits: float = 0.0
    bytes: int = 0
    tokens: int = 0
    documents: int = 0

    @property
    def bits_per_byte(self) -> float:
        """NaN where nothing was read."""
        return self.bits / self.bytes if self.bytes else math.nan

    def __add__(self, other: Bits) -> Bits:
        return Bits(
            self.bits + other.bits,
            self.bytes + other.bytes,
            self.tokens + other.tokens,
            self.documents + other.documents,
        )


@dataclass(frozen=True, slots=True)
class BitsPerByteResult:
    """Bits per byte in all and, where documents name one, of each subset.

    Attributes:
        total: of everything that was read.
        subsets: by name, in the order of the alphabet.
        protocol: the measurement in words.
    """

    total: Bits
    subsets: Mapping[str, Bits]
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: `weight` is a subset's share of the bytes."""

        def row(bits: Bits) -> dict[str, Any]:
            return {
                "bits_per_byte": bits.bits_per_byte,
                "weight": bits.bytes / self.total.bytes,
                "bytes": bits.bytes,
                "tokens": bits.tokens,
                "documents": bits.documents,
            }

        parts = {name: row(bits) for name, bits in self.subsets.items()}
        return {**row(self.total), "subsets": parts, "protocol": self.protocol}


def bits_per_byte(
    model: Any,
    tokenizer: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    subsets: Subsets | None = None,
    window: int | None = None,
    max_documents: int | None = None,
    progress: DocumentsDone | None = None,
) -> BitsPerByteResult:
    """Bits per byte of documents, read one at a time.

    Args:
        model: called with `input_ids` `[1, tokens]`.
        tokenizer: the model's own.
        samples: from `read_samples`; a sample with "pile_set_name" counts for that subset.
        subsets: measure these only.
        window: tokens a window; 2048 by default, and never more than the model's context.
        max_documents: stop after so many of those chosen.
        progress: called with (documents done, `max_documents`) after each.

    Raises:
        CalibrationError: the samples cannot be read, or hold no text of the subsets chosen.
        ConfigError: an impossible window or max_documents.
        NumericsError: NaN or inf in the loss.
    """
    limit = fitting_window(STANDARD_WINDOW if window is None else window, model)
    if limit < 2:
        raise ConfigError(f"window={limit} is not possible", hint="at least 2")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"max_documents={max_documents} is not possible", hint="at least 1")
    chosen = subsets.select(samples, "the text") if subsets else samples
    prefix = first_token(tokenizer)
    total, parts = Bits(), dict[str, Bits]()
    with evaluating(model):
        for sample in chosen:
            text = sample_text(sample)
            if not text:
                continue
            bits = _document(model, tokenizer, text, limit, prefix)
            if not math.isfinite(bits.bits):
                raise NumericsError(f"the loss of document {total.documents} is {bits.bits}", hint="try bfloat16")
            total += bits
            if (name := sample.get(SUBSET)) is not None:
                parts[name] = parts.get(name, Bits()) + bits
            if progress:
                progress(total.documents, max_documents)
            if total.documents == max_documents:
                break
    if not total.bytes:
        raise CalibrationError("there is no text to measure on", hint="give a file with text in it")
    part_of = f"the first {total.documents}" if total.documents == max_documents else f"{total.documents}"
    opened = "after a beginning-of-text token" if prefix is not None else "its first token not counted"
    protocol = (
        f"{part_of} documents one by one, each {opened}, windows of {limit} tokens, every token predicted once; "
        "UTF-8 bytes of the text"
    )
    return BitsPerByteResult(total, dict(sorted(parts.items())), protocol)


def first_token(tokenizer: Any) -> int | None:
    """The token that a document's first one is predicted from: beginning of text, else end of text, else none."""
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    return None


def _document(model: Any, tokenizer: Any, text: str, window: int, prefix: int | None) -> Bits:
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    sequence = torch.tensor([*([] if prefix is None else [prefix]), *ids], dtype=torch.int64)
    loss, predicted = 0.0, max(0, len(sequence) - 1)
    for start in range(0, predicted, window):
        end = min(start + window, predicted)
        inputs, targets = sequence[max(0, end - window) : end], sequence[start + 1 : end + 1]
        loss += summed_loss(logits_of(model, inputs)[-len(targets) :], targets)
    return Bits(loss / math.log(2), len(text.encode("utf-8", "surrogatepass")), predicted, 1)
