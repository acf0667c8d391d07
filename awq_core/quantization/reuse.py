"""What a finished run found, for another run to use instead of searching.

    scales    kept beside the weights in `calibration/scales.safetensors`, one vector a scale group, before rounding
    grids     read off the checkpoint itself: step and zero point of every group are in it

Scales serve any group size and rounding. Grids serve the same group size, where the same settings then give the same
bytes without a single token; ranges found for other groups are worth nothing (docs/decisions.md), so with another group
size they are searched, which takes the calibration but not the scale search.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from awq_core.checkpoint.pack import unpack
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.config import QuantConfig
from awq_core.errors import CheckpointError, ConfigError
from awq_core.model_folder import raw_config
from awq_core.quantization.rounding import Grid

SCALES = "calibration/scales.safetensors"


class Found:
    """An earlier run's folder, opened; a context manager.

    Args:
        folder: of a finished run.
        source: fingerprint of the checkpoint that is quantized now.
        names: name in the model -> name on disk.

    Raises:
        ConfigError: the folder holds no scales, or those of another checkpoint.
        CheckpointError: its weights cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], source: str, names: Mapping[str, str]) -> None:
        self.folder, self._names = Path(folder), names
        path = self.folder / SCALES
        hint = "name the output folder of a finished `awq quantize`"
        if not (self.folder / "config.json").is_file() or not path.is_file():
            raise ConfigError(f"nothing to reuse in {folder}: {SCALES} or config.json is missing", hint=hint)
        try:
            with safe_open(path, framework="pt") as file:
                made_of = (file.metadata() or {}).get("source")
                self._scales = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read", hint=hint) from error
        if made_of != source:
            raise ConfigError(f"{folder} was made of another checkpoint", hint="reuse needs the same original weights")
        self._reader = CheckpointReader(self.folder)
        self._group_size = raw_config(self.folder)["quantization_config"]["group_size"]

    def __enter__(self) -> Found:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.close()

    def suffices(self, config: QuantConfig, head: str = "") -> bool:
        """Whether nothing is left to search, so that no calibration is needed; `head` is the output head's path in the
        model where that is quantized, which the earlier run may have kept."""
        known = config.clip == "none" or config.group_size == self._group_size
        if known and head and config.clip != "none":
            known = self._base(head) + "qzeros" in self._reader
        return known and config.rounding == "nearest" and not (config.correct_inputs or config.correct_bias)

    def scale(self, prev: str, *, like: torch.Tensor) -> torch.Tensor:
        """s of the group that `prev`, by its path in the model, absorbs; `[in]` fp32, on the device of `like`.

        Raises:
            ConfigError: that run did not search it.
        """
        if prev not in self._scales:
            raise ConfigError(
                f"{self.folder} has no scales for {prev}",
                hint="it was made with --no-scale or by another plugin; run without --reuse",
            )
        return self._scales[prev].to(like.device)

    def grid(self, name: str, groups: int, device: torch.device) -> Grid | None:
        """The grid of a linear, by its path in the model; None where that run kept it or had other groups."""
        base = self._base(name)
        if base + "qzeros" not in self._reader or self._reader.shape(base + "scales")[0] != groups:
            return None
        zero, step = unpack(self._reader.tensor(base + "qzeros")), self._reader.tensor(base + "scales")
        return Grid(step.float().T.contiguous().to(device), zero.float().T.contiguous().to(device))

    def _base(self, name: str) -> str:
        """What the names of a linear's tensors begin with on disk: its path in the model where the original has no
        weight for it, since it shares that of another."""
        return self._names.get(f"{name}.weight", f"{name}.weight").removesuffix("weight")


def to_payload(scales: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Scales as the journal holds them, exactly."""
    return {name: base64.b64encode(scale.float().cpu().numpy().tobytes()).decode() for name, scale in scales.items()}


def scales_file(payloads: Iterable[Mapping[str, Any]], source: str) -> bytes:
    """Contents of `calibration/scales.safetensors`, of what `to_payload` gave for each block."""
    scales = {
        name: torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())
        for payload in payloads
        for name, text in payload.items()
    }
    return save(scales, {"source": source})  # one key: several would be written in any order
