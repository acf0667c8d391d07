"""transformers' table of quantizers, one class for each `quant_method`: put one of ours in, and what was there back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

_replaced: dict[str, Any] = {}  # method -> what ours stands in the place of, None where nothing was there


def put_in(method: str, ours: type) -> ExitStack:
    """Let transformers use `ours`, until `take_out`.

    Returns:
        A context manager that undoes it; one that does nothing where it was in before.
    """
    undo = ExitStack()
    if AUTO_QUANTIZER_MAPPING.get(method) is not ours:
        _replaced[method] = AUTO_QUANTIZER_MAPPING.get(method)
        AUTO_QUANTIZER_MAPPING[method] = ours
        undo.callback(take_out, method, ours)
    return undo


def take_out(method: str, ours: type) -> None:
    """Put back what `ours` replaced; where it is not in, nothing happens."""
    if AUTO_QUANTIZER_MAPPING.get(method) is ours:
        previous = _replaced.pop(method, None)
        if previous is None:
            del AUTO_QUANTIZER_MAPPING[method]
        else:
            AUTO_QUANTIZER_MAPPING[method] = previous
