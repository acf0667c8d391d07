"""From whatever the user names to batches: the source is read, the model's own tokenizer or processor does the rest.

The first sample decides: with images, every sample goes through the model's processor, by the plugin's hook; without,
all texts become one stream of tokens, cut into windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from awq_core.calibration.batches import CalibrationData, multimodal_batches, text_batches
from awq_core.calibration.sources import describe_source, read_samples
from awq_core.calibration.subsets import Subsets, shares
from awq_core.errors import CalibrationError

MakeBatch = Callable[[Any, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Preprocessors:
    """What turns samples into tokens: the object the caller gave, else the model folder's own, opened when needed."""

    folder: Path
    given: Any
    trust_remote_code: bool

    def tokenizer(self) -> Any:
        """Raises CalibrationError where the folder has none."""
        from transformers import AutoTokenizer

        return self._open(AutoTokenizer, "tokenizer")

    def processor(self) -> Any:
        """Raises CalibrationError where the folder has none, or it needs a package that is not installed."""
        from transformers import AutoProcessor

        return self._open(AutoProcessor, "image processor")

    def _open(self, auto: Any, what: str) -> Any:
        if self.given is not None:
            return self.given
        try:
            return auto.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise CalibrationError(
                f"{self.folder}: no {what} could be opened: {reason}",
                hint=f"copy the {what} files there, install what it names, or pass tokenizer=",
            ) from error


def prepare_for(
    config: Any,
    source: Any,
    preprocessors: Preprocessors,
    make_batch: MakeBatch,
    *,
    samples: int,
    seq_len: int,
    subsets: Subsets | None,
    seed: int,
) -> tuple[CalibrationData, int, list[str]]:
    """`prepare` for a model: (batches, tokens in a window, what to tell the user). A window is no longer than the
    model's context.

    Args:
        config: transformers' configuration of the model.

    Raises:
        CalibrationError: see `prepare`.
    """
    told = []
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < seq_len:
        told.append(f"calibration windows of {limit} tokens, the model's context, not {seq_len}")
        seq_len = limit
    data = prepare(
        source,
        preprocessors,
        make_batch,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        vocab_size=getattr(text, "vocab_size", None),
        subsets=subsets,
    )
    told.append(f"calibration: {data.samples} samples, {data.tokens} tokens from {data.source}")
    if data.mixture:
        told.append(f"calibration mixture: {shares(data.mixture)} of the tokens")
    return data, seq_len, told + [f"calibration: {note}" for note in data.notes]


def prepare(
    source: Any,
    preprocessors: Preprocessors,
    make_batch: MakeBatch,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    vocab_size: int | None,
    subsets: Subsets | None = None,
) -> CalibrationData:
    """Calibration batches from a source (see `read_samples`), or ready `CalibrationData`, which is passed on.

    Args:
        make_batch: (processor, sample) -> model inputs, for samples with images.
        subsets: read only these subsets, where rows name one.

    Raises:
        CalibrationError: the source is empty, too short or unreadable; there is no tokenizer.
    """
    if isinstance(source, CalibrationData):
        return source
    stream = iter(read_samples(source, shuffle=True, seed=seed, subsets=subsets))
    first = next(stream, None)
    description = describe_source(source)
    if first is None:
        raise CalibrationError(f"{description}: no samples", hint="give a file or folder with text")
    every = chain([first], stream)
    if first.get("images"):
        processor = preprocessors.processor()
        return multimodal_batches(
            every,
            make_batch=lambda sample: make_batch(processor, sample),
            n_samples=samples,
            description=description,
        )
    return text_batches(
        every,
        preprocessors.tokenizer(),
        n_samples=samples,
        seq_len=seq_len,
        seed=seed,
        description=description,
        vocab_size=vocab_size,
    )
