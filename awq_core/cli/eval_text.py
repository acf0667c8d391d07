"""The text that `awq eval`, `awq compare` and `awq report` measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

BUILTIN_WINDOWS = 16
# More characters than any tokenizer puts into a token on average.
CHARACTERS = 8
DIVERGENCE_WINDOW = 512
# Names of data sets that papers measure on -> the source's name and its split.
MEASURED = {"wikitext2": ("wikitext2", "test"), "c4": ("c4", "validation"), "c4-new": ("c4", "validation")}


@dataclass(frozen=True)
class EvalText:
    """A text and what to call it.

    Attributes:
        windows: most windows to measure; None for all.
        documents: of C4's protocols, which `text` is the beginning of.
    """

    text: str
    name: str
    windows: int | None
    documents: tuple[dict[str, Any], ...] = ()


def eval_text(
    source: str | None, split: str | None, window: int | None, max_windows: int | None, *, c4: bool = False
) -> EvalText:
    """The text to measure on; without a source, standard-library modules that calibration's default reads last.

    Args:
        c4: keep the documents apart, and join the first of them by spaces, as C4's protocols do.

    Raises:
        CalibrationError: the source cannot be read.
        click.UsageError: a split of what has none; a protocol for documents, and none given.
    """
    from itertools import islice

    from awq_core.calibration import describe_source, read_samples, read_text, standard_library
    from awq_core.calibration.formats import sample_text
    from awq_core.calibration.sources import local_path
    from awq_core.evaluation.c4 import DOCUMENTS, NEW_DOCUMENTS
    from awq_core.evaluation.perplexity import STANDARD_WINDOW

    if source in MEASURED and local_path(source) is None:
        source, usual = MEASURED[source]
        split = split or usual
    elif split is not None and (source is None or local_path(source) is not None):
        raise click.UsageError("--split is for hub datasets")
    if source is not None:
        name = describe_source(source) + (f", split {split}" if split else "")
        if not c4:
            return EvalText(read_text(source, split=split), name, max_windows)
        documents = tuple(islice(read_samples(source, split=split), DOCUMENTS))
        text = " ".join(sample_text(one) for one in documents[:NEW_DOCUMENTS])
        return EvalText(text, name, max_windows, documents)
    if c4:
        raise click.UsageError("--protocol c4 and c4-new need --text")
    windows = max_windows or BUILTIN_WINDOWS
    enough = windows * (window or STANDARD_WINDOW) * CHARACTERS
    pieces: list[str] = []
    for sample in reversed(list(standard_library())):
        if sum(map(len, pieces)) >= enough:
            break
        pieces.append(sample["text"])
    name = "Python standard library source (built-in default), the modules that calibration reads last"
    return EvalText("\n\n".join(pieces), name, windows)
