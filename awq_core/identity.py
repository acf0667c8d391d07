"""What the bytes of a result depend on. A run is resumed only by one that agrees in all of it."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

import torch

from awq_core.calibration.batches import CalibrationData
from awq_core.checkpoint.reader import fingerprint
from awq_core.plan_types import Plan
from awq_core.version import __version__


def identity(
    source: str,
    plan: Plan,
    data: CalibrationData | None,
    dtype: torch.dtype,
    device: torch.device,
    reuse: str | os.PathLike[str] | None,
    shards: int = 1,
) -> dict[str, Any]:
    """As the journal holds it: settings by name, so that a refusal can say which differ, and digests of the rest.

    Args:
        source: fingerprint of the original checkpoint.
        data: calibration tokens, where there are any.
        dtype, device: what blocks are worked in and on.
        reuse: folder of the earlier run whose scales are taken.
        shards: in which sums over calibration tokens are made.
    """
    tokens = hashlib.sha256()
    for batch in data.batches if data else ():
        for key in sorted(batch):
            tokens.update(key.encode() + str(batch[key].dtype).encode() + str(tuple(batch[key].shape)).encode())
            tokens.update(batch[key].contiguous().view(torch.uint8).numpy().tobytes())
    decided = plan.to_dict()
    settings = {key: decided.pop(key) for key in ("config", "plugin", "dist", "version")}
    return {
        **settings,
        "source": source,
        "reuse": "none" if reuse is None else fingerprint(reuse),
        "calibration": tokens.hexdigest() if data else "none",
        "calib_shards": shards,
        "plan": digest(decided),
        "dtype": str(dtype),
        "device": device.type,
        "versions": {"awq_core": __version__, "torch": torch.__version__},
    }


def digest(value: dict[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
