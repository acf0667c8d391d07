"""Bytes as people write them: "13.5 GB" is 13.5 · 10⁹, "13.5 GiB" is 13.5 · 2³⁰."""

from __future__ import annotations

import math
import re

from awq_core.errors import ConfigError

_POWERS = "KMGT"


def size_text(size: float) -> str:
    """Bytes for people: "13.5 GB"."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def parse_size(text: str | float) -> int:
    """Bytes of "5GB", "4.7 GiB", "800m" or a plain number.

    Raises:
        ConfigError: it is no size, or not a positive one.
    """
    match = re.fullmatch(rf"\s*([\d.]+(?:e\d+)?)\s*(?:([{_POWERS}])(i?))?B?\s*", str(text), re.IGNORECASE)
    try:
        size = float(match[1]) if match else 0.0
    except ValueError:
        size = 0.0
    if not match or not 0 < size < math.inf:
        raise ConfigError(f"{text!r} is no size", hint="write it as 5GB, 4.7GiB or in bytes")
    power = _POWERS.index(match[2].upper()) + 1 if match[2] else 0
    return int(size * (1024 if match[3] else 1000) ** power)
