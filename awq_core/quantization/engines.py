"""The engines by name, and what spreads the independent work of each (`spread.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from awq_core.errors import ConfigError
from awq_core.quantization.spread import Spread, here, threads

ENGINES = ("local", "ray")


def spreading(engine: str, address: str | None, devices: Sequence[torch.device]) -> AbstractContextManager[Spread]:
    """What spreads the work of an engine, by its name.

    Args:
        address: of a Ray cluster; None is one of its own on this machine.
        devices: where the work is done, the first also where blocks are.

    Raises:
        ConfigError: no such engine, or arguments that it does not have.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r} is not known", hint=" or ".join(map(repr, ENGINES)))
    if engine == "ray":
        if len(devices) > 1:
            raise ConfigError("one device with engine ray, which gives its tasks GPUs itself", hint="--device cuda")
        from awq_core.integrations.ray import cluster

        return cluster(address, devices[0])
    if address is not None:
        raise ConfigError(f"address={address!r} is of a Ray cluster", hint="--engine ray")
    return threads(devices) if len(devices) > 1 else nullcontext(here)
