"""Calibration: samples of text and images (`sources`), as batches of tokens (`batches`).

    samples = read_samples("corpus.jsonl", shuffle=True)
    data = text_batches(samples, tokenizer, description=describe_source("corpus.jsonl"))

Names are imported when first used, so that reading samples does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from awq_core.calibration.batches import CalibrationData, multimodal_batches, text_batches
    from awq_core.calibration.sources import describe_source, read_samples, read_text, standard_library
    from awq_core.calibration.subsets import Subsets

HOMES = {
    "CalibrationData": "batches",
    "Subsets": "subsets",
    "multimodal_batches": "batches",
    "text_batches": "batches",
    "describe_source": "sources",
    "read_samples": "sources",
    "read_text": "sources",
    "standard_library": "sources",
}

__all__ = [
    "CalibrationData",
    "Subsets",
    "describe_source",
    "multimodal_batches",
    "read_samples",
    "read_text",
    "standard_library",
    "text_batches",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
