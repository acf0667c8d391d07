"""Int4 linear kernels and the one place where a backend is chosen.

A backend repacks a checkpoint's linear once, at load, into the tensors it wants, and multiplies with them:

    state = kernel.prepare(packed, dtype)      y = kernel.linear(x, state)      x [tokens, in] -> y [tokens, out]

Backends are declared as `KernelBackend` values, the core's own as well as plugins'. The highest priority that
supports device, dtype and shape wins; `AWQ_KERNEL=name` forces one. A backend may hold several ways to multiply and
pick one at each call, by the number of tokens. `operator.py` makes the product one operator of torch; `survey.py` says
which backends run here, and why the others do not.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from awq_core.checkpoint.pack import PackedLinear
from awq_core.errors import ConfigError
from awq_core.hooks.defaults import KERNEL_BACKENDS
from awq_core.hooks.types import KernelBackend

FORMAT = "gemm"


class Kernel(Protocol):
    """What a backend's factory returns.

    More methods are used where a kernel has them: `linear_bias(x, state, bias)`, the product with the bias added before
    it is rounded; `dequantize(state, dtype)`, the weight `[out, in]`, which makes gradients cheaper; and `detail()`, a
    line for `awq kernels`.
    """

    def unsupported(self, packed: PackedLinear, dtype: torch.dtype) -> str:
        """Why this linear cannot run here in `dtype`, or an empty string."""

    def prepare(self, packed: PackedLinear, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The tensors `linear` needs, on the device of `packed`."""

    def linear(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """x `[tokens, in]` times the weight transposed: `[tokens, out]`, in the dtype of x."""


@runtime_checkable
class GroupedKernel(Protocol):
    """What a kernel has besides that multiplies each token with the weights of the experts it was sent to."""

    def stack(self, states: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `prepare` made of the experts' linears, of one shape, as the tensors of one."""

    def unstack(self, state: dict[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
        """One expert's, as views of the stack."""

    def grouped_linear(self, x: torch.Tensor, state: dict[str, torch.Tensor], choices: torch.Tensor) -> torch.Tensor:
        """x `[T, in]`, or `[T · k, in]`, for the expert numbers choices `[T, k]`: `[T · k, out]`, in their order."""


@runtime_checkable
class GatedKernel(Protocol):
    """What a kernel has besides that makes silu(gate) · up of a product before it is written."""

    def interleave(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state of a weight with gate's rows first and up's after them, as that of one with both in turn."""

    def gated_linear(self, x: torch.Tensor, state: dict[str, torch.Tensor], bias: torch.Tensor | None) -> torch.Tensor:
        """x `[tokens, in]`, weight and bias in turn `[2 · inner]`: `[tokens, inner]`."""


class Choice(NamedTuple):
    """A backend that runs a linear: its name, its kernel, and the factory that made it."""

    name: str
    kernel: Kernel
    factory: str


def choose(
    packed: PackedLinear,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    backends: Sequence[KernelBackend] = KERNEL_BACKENDS,
) -> Choice:
    """The best of `backends` for one linear.

    Raises:
        ConfigError: `AWQ_KERNEL` names a backend that does not exist or cannot run this linear.
    """
    candidates = sorted(backends, key=lambda backend: (-backend.priority, backend.name))
    forced = os.environ.get("AWQ_KERNEL")
    if forced:
        candidates = [backend for backend in candidates if backend.name == forced]
        if not candidates:
            names = ", ".join(sorted(backend.name for backend in backends))
            raise ConfigError(f"AWQ_KERNEL={forced}: no such backend", hint=f"one of: {names}")
    reasons = []
    for backend in candidates:
        made = usable(backend, packed, dtype, device)
        if not isinstance(made, str):
            return Choice(backend.name, made, backend.factory)
        reasons.append(f"{backend.name}: {made}")
    hint = "unset AWQ_KERNEL" if forced else "a backend that runs it must be among kernel_backends()"
    raise ConfigError(f"no int4 kernel runs this linear: {'; '.join(reasons)}", hint=hint)


def usable(backend: KernelBackend, packed: PackedLinear, dtype: torch.dtype, device: str) -> Kernel | str:
    """The backend's kernel if it runs this linear, else why it does not."""
    why = _unfit(backend, device)
    if why:
        return why
    made = _make(backend)
    return made if isinstance(made, str) else made.unsupported(packed, dtype) or made


def instance(factory: str) -> Kernel:
    """The kernel of a factory, made where this process has not made it yet (a program exported by another one).

    Raises:
        ConfigError: the factory failed.
    """
    made = _MADE.get(factory)
    if made is None:
        made = _make(KernelBackend(name=factory, formats=(), devices=(), factory=factory))
    if isinstance(made, str):
        raise ConfigError(made, hint="awq kernels lists what runs here")
    return made


def _unfit(backend: KernelBackend, device: str) -> str:
    """Why a backend cannot run on this device, as far as its declaration tells; empty when it can."""
    if FORMAT not in backend.formats:
        return f"does not read format {FORMAT}"
    if device not in backend.devices:
        return f"not on {device}"
    if device == "cuda" and backend.min_capability:
        major, minor = torch.cuda.get_device_capability()
        if 10 * major + minor < backend.min_capability:
            return f"needs compute capability {backend.min_capability}, this GPU has {10 * major + minor}"
    return ""


_MADE: dict[str, Kernel | str] = {}


def _make(backend: KernelBackend) -> Kernel | str:
    """The backend's kernel, made once; or why its factory failed, said once: another backend then takes its place."""
    if backend.factory not in _MADE:
        module, _, attribute = backend.factory.partition(":")
        try:
            _MADE[backend.factory] = getattr(importlib.import_module(module), attribute)()
        except Exception as error:
            reason = " ".join(str(error).split())
            _MADE[backend.factory] = f"{backend.factory} failed: {type(error).__name__}: {reason}"
            print(f"kernel backend {backend.name!r} not used: {_MADE[backend.factory]}", file=sys.stderr)
    return _MADE[backend.factory]
