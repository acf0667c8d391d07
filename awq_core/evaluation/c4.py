"""C4's windows as GPTQ's code draws them, in its two ways; papers say "C4" for either.

    c4       256 windows: documents drawn at random (seed 0) until one is longer than a window, then a place in it
    c4-new   the first 1100 documents joined by a space, cut into at most 256 windows that do not overlap

Both read the first file of C4's English validation set (45,576 documents), and both end as WikiText's protocol does:
the mean over windows of the mean loss of a window's tokens. GPTQ: Frantar et al. 2022, arXiv 2210.17323,
"datautils.py".
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from awq_core.calibration.formats import sample_text
from awq_core.errors import CalibrationError, ConfigError
from awq_core.evaluation.perplexity import (
    STANDARD_WINDOW,
    PerplexityResult,
    Progress,
    fitting_window,
    windows_perplexity,
)

PROTOCOLS = ("c4", "c4-new")
DOCUMENTS = 45_576
NEW_DOCUMENTS = 1100
WINDOWS = 256
SEED = 0
# The draw gives up after so many documents in a row that are too short: the text holds none that is long enough.
PATIENCE = 20_000


def c4_perplexity(
    model: Any,
    tokenizer: Any,
    samples: Iterable[Any],
    *,
    protocol: str = "c4",
    window: int | None = None,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity on C4, or on documents of another source by C4's protocol.

    Args:
        model, tokenizer, progress: as in `perplexity`.
        samples: documents in order, as `read_samples("c4", split="validation")` gives them.
        protocol: "c4" or "c4-new".
        window: tokens a window; 2048 by default, and never more than the model's context.
        max_windows: only the first so many of the 256.

    Raises:
        CalibrationError: the documents cannot be read, or none is long enough.
        ConfigError: an unknown protocol, an impossible window or max_windows.
        NumericsError: NaN or inf in the loss.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r} is not known", hint=" or ".join(PROTOCOLS))
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} is not possible", hint="at least 1")
    limit = fitting_window(STANDARD_WINDOW if window is None else window, model)
    if limit < 2:
        raise ConfigError(f"window={limit} is not possible", hint="at least 2")
    count = min(WINDOWS, max_windows or WINDOWS)
    first = DOCUMENTS if protocol == "c4" else NEW_DOCUMENTS
    documents = [sample_text(sample) for sample in islice(samples, first)]
    make = random_windows if protocol == "c4" else joined_windows
    windows = make(tokenizer, documents, limit, count)
    how = f"of {len(documents)} documents joined by spaces" if protocol == "c4-new" else "drawn from documents, seed 0"
    words = f"GPTQ's {protocol}: {len(windows)} windows of {limit} tokens {how}, mean over windows"
    return windows_perplexity(model, windows, words, progress)


def random_windows(tokenizer: Any, documents: list[str], window: int, count: int) -> torch.Tensor:
    """`[count, window]` int64: one window of each of `count` documents, all drawn with GPTQ's seed.

    Raises: CalibrationError where no document is longer than a window.
    """
    draw = random.Random(SEED)
    windows, refused = list[list[int]](), 0
    while len(windows) < count:
        if not documents or refused > PATIENCE:
            raise CalibrationError(
                f"no document of {len(documents)} is longer than {window} tokens", hint="a smaller --window"
            )
        text = documents[draw.randint(0, len(documents) - 1)]
        ids = _ids(tokenizer, text)
        # GPTQ takes a document of exactly one window too, and then fails to draw a place in it.
        if len(ids) <= window:
            refused += 1
            continue
        start = draw.randint(0, len(ids) - window - 1)
        windows.append(ids[start : start + window])
        refused = 0
    return torch.tensor(windows, dtype=torch.int64)


def joined_windows(tokenizer: Any, documents: list[str], window: int, count: int) -> torch.Tensor:
    """`[at most count, window]` int64: the documents as one text, cut; the tail is dropped.

    Raises: CalibrationError where the text is shorter than a window.
    """
    ids = torch.tensor(_ids(tokenizer, " ".join(documents)), dtype=torch.int64)
    if len(ids) < window:
        raise CalibrationError(f"the text has {len(ids)} tokens, a window {window}", hint="a smaller --window")
    full = min(len(ids) // window, count)
    return ids[: full * window].view(full, window)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])
