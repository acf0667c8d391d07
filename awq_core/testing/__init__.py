"""The conformance kit: what a plugin author inherits to prove a plugin right.

from awq_core.testing import ArchitectureConformance
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "TINY_DECODER",
    "ArchitectureConformance",
    "diagnose",
    "noise_image",
    "proof_error",
    "save_tiny",
    "tiny_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name == "ArchitectureConformance":
        from awq_core.testing.conformance import ArchitectureConformance

        return ArchitectureConformance
    if name == "diagnose":
        from awq_core.testing.diagnosis import diagnose

        return diagnose
    if name == "proof_error":
        from awq_core.testing.wrong import proof_error

        return proof_error
    if name in ("TINY_DECODER", "noise_image", "save_tiny", "tiny_tokenizer"):
        from awq_core.testing import tiny

        return getattr(tiny, name)
    raise AttributeError(name)
