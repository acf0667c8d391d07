"""Which backends run on this machine, in which dtypes, and why the others do not: what `awq kernels` prints.

Nothing is declared for this: every backend is asked about one ordinary linear (256 inputs, 64 outputs, groups of 128)
on every device this machine has, through the same functions that choose a backend when a model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from awq_core import kernels
from awq_core.checkpoint.pack import PackedLinear
from awq_core.devices import dtype_name
from awq_core.errors import ConfigError
from awq_core.hooks.types import KernelBackend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Finding:
    """One backend on one device.

    Attributes:
        name, priority: of the backend.
        device: where it was asked, or "" where this machine has none of its devices.
        reasons: dtype -> why it does not run, or "" where it does.
        chosen: dtypes in which it is the one that runs an ordinary linear.
        detail: what the kernel says of itself.
    """

    name: str
    priority: int
    device: str
    reasons: dict[str, str]
    chosen: tuple[str, ...]
    detail: str


def survey(backends: Sequence[KernelBackend], devices: Sequence[str] | None = None) -> tuple[Finding, ...]:
    """Every backend, best first, on each of its devices that this machine has.

    Args:
        devices: ask about these only; default: those torch finds.
    """
    present = tuple(devices) if devices is not None else present_devices()
    found: list[Finding] = []
    for backend in sorted(backends, key=lambda one: (-one.priority, one.name)):
        here = [device for device in present if device in backend.devices]
        found += [_ask(backend, device, backends) for device in here]
        if not here:
            why = f"runs on {' and '.join(backend.devices)}; not found here"
            found.append(Finding(backend.name, backend.priority, "", {dtype_name(one): why for one in DTYPES}, (), ""))
    return tuple(found)


def present_devices() -> tuple[str, ...]:
    """Device types of this machine."""
    others = ("cuda", "xpu", "mps")
    return ("cpu", *(name for name in others if getattr(torch, name).is_available()))


def _ask(backend: KernelBackend, device: str, backends: Sequence[KernelBackend]) -> Finding:
    packed = PackedLinear(
        qweight=torch.zeros(256, 8, dtype=torch.int32, device=device),
        qzeros=torch.zeros(2, 8, dtype=torch.int32, device=device),
        scales=torch.ones(2, 64, dtype=torch.float16, device=device),
    )
    answers = {dtype_name(dtype): kernels.usable(backend, packed, dtype, device) for dtype in DTYPES}
    usable = [one for one in answers.values() if not isinstance(one, str)]
    return Finding(
        name=backend.name,
        priority=backend.priority,
        device=device,
        reasons={name: one if isinstance(one, str) else "" for name, one in answers.items()},
        chosen=tuple(dtype_name(dtype) for dtype in DTYPES if _winner(packed, dtype, device, backends) == backend.name),
        detail=usable[0].detail() if usable and hasattr(usable[0], "detail") else "",
    )


def _winner(packed: PackedLinear, dtype: torch.dtype, device: str, backends: Sequence[KernelBackend]) -> str:
    try:
        return kernels.choose(packed, dtype, device=device, backends=backends).name
    except ConfigError:  # the one AWQ_KERNEL names cannot run it
        return ""
