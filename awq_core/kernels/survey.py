"""Which backends run on this machine, in which dtypes, and why the others do not: what `awq kernels` prints; and which
will run the linears of a planned model, for `awq plan`.

Nothing is declared for this. For `awq kernels` every backend is asked about one ordinary linear (256 inputs, 64
outputs, groups of 128) on every device this machine has, for `awq plan` about each shape of the model, through the same
functions that choose a backend when a model is loaded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True, slots=True)
class Runner:
    """The kernel that will run some linears of a model here.

    Attributes:
        name: of the backend; "" where none can.
        linears: how many it runs.
        why: what the kernel says of itself, and "AWQ_KERNEL" where that chose it; why none can.
        passed_over: backend of a higher priority for this device -> why it does not run them.
    """

    name: str
    linears: int
    why: str
    passed_over: dict[str, str]


def runners(
    shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: str, backends: Sequence[KernelBackend]
) -> tuple[Runner, ...]:
    """Which kernel runs linears of these shapes, most linears first.

    Args:
        shapes: (inputs, outputs, group size) of each linear.
        dtype: of activations.
        device: its type, "cpu" or "cuda".
    """
    found: list[Runner] = []
    for (inputs, outputs, group), count in Counter(shapes).items():
        packed = _blank(inputs, outputs, group, device)
        name, why, passed_over = _runner(packed, dtype, device, backends)
        same = next((one for one in found if (one.name, one.why, one.passed_over) == (name, why, passed_over)), None)
        if same is not None:
            found.remove(same)
            count += same.linears
        found.append(Runner(name, count, why, passed_over))
    return tuple(sorted(found, key=lambda one: -one.linears))


def _runner(
    packed: PackedLinear, dtype: torch.dtype, device: str, backends: Sequence[KernelBackend]
) -> tuple[str, str, dict[str, str]]:
    """Name, why and what was passed over."""
    try:
        chosen = kernels.choose(packed, dtype, device=device, backends=backends)
    except ConfigError as error:
        return "", str(error), {}
    if os.environ.get("AWQ_KERNEL"):
        return chosen.name, "; ".join(filter(None, [f"AWQ_KERNEL={chosen.name}", _detail(chosen.kernel)])), {}
    passed_over = {}
    for backend in sorted(backends, key=lambda one: (-one.priority, one.name)):
        if backend.name == chosen.name:
            break
        if device in backend.devices:
            why = kernels.usable(backend, packed, dtype, device)
            passed_over[backend.name] = why if isinstance(why, str) else ""
    return chosen.name, _detail(chosen.kernel), passed_over


def _detail(kernel: kernels.Kernel) -> str:
    return str(kernel.detail()) if hasattr(kernel, "detail") else ""


def _blank(inputs: int, outputs: int, group: int, device: str) -> PackedLinear:
    """A linear of this shape, its numbers whatever they are: nothing reads them."""
    return PackedLinear(
        qweight=torch.empty(inputs, outputs // 8, dtype=torch.int32, device=device),
        qzeros=torch.empty(inputs // group, outputs // 8, dtype=torch.int32, device=device),
        scales=torch.empty(inputs // group, outputs, dtype=torch.float16, device=device),
    )


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
    packed = _blank(256, 64, 128, device)
    answers = {dtype_name(dtype): kernels.usable(backend, packed, dtype, device) for dtype in DTYPES}
    usable = [one for one in answers.values() if not isinstance(one, str)]
    return Finding(
        name=backend.name,
        priority=backend.priority,
        device=device,
        reasons={name: one if isinstance(one, str) else "" for name, one in answers.items()},
        chosen=tuple(dtype_name(dtype) for dtype in DTYPES if _winner(packed, dtype, device, backends) == backend.name),
        detail=_detail(usable[0]) if usable else "",
    )


def _winner(packed: PackedLinear, dtype: torch.dtype, device: str, backends: Sequence[KernelBackend]) -> str:
    try:
        return kernels.choose(packed, dtype, device=device, backends=backends).name
    except ConfigError:  # the one AWQ_KERNEL names cannot run it
        return ""
