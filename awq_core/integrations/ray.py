"""The searches of a block as tasks on a Ray cluster; the driver loads, runs forward, writes.

`cluster` is a `Spread` (awq_core/quantization/spread.py): one task an item. The tensors of an item, its weight and its
Gram matrix, go to Ray's object store; one that many items share, as a layer's experts do, goes there once. They come
out as memory of the worker's own, aligned as everywhere else, and torch works in as many threads as in the driver: the
order of additions is the same, and so are the bytes. A worker with other versions, or another kind of processor, for
which that does not hold, is refused.

A task whose worker dies is run again elsewhere. The driver keeps the journal: when it dies, the same command resumes.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from awq_core.errors import AwqError, ConfigError
from awq_core.quantization.spread import Spread, in_order, moved, with_tensors
from awq_core.version import __version__

T = TypeVar("T")
R = TypeVar("R")

# A task is run again this often when its worker dies.
RETRIES = 8
# Tensors from this size on are put in the object store; smaller ones travel with the task.
STORED_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class _Slot:
    """Stands for a tensor whose bytes travel beside the value."""

    index: int
    dtype: torch.dtype
    shape: torch.Size


@contextmanager
def cluster(address: str | None, device: torch.device) -> Iterator[Spread]:
    """Connect to a cluster, or start one on this machine where `address` is None; a connection that the program has
    already is used, and left open.

    Args:
        address: "auto" or "host:port", as `ray.init` takes it.
        device: where the driver works. With "cuda" each task is given one GPU, else as many CPUs as torch has threads.

    Raises:
        ConfigError: Ray is not installed, the cluster is not there, or it has no machine that can run a task.
        AwqError: a task failed on every machine that it was tried on.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    try:
        import ray
    except ImportError as error:
        raise ConfigError("Ray is not installed", hint='pip install "awq-core[ray]"') from error
    opened = not ray.is_initialized()
    if opened:
        try:
            _reach(address)
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **_own(address))
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(f"no Ray cluster at {address!r}: {reason}", hint="ray start --head") from error
    try:
        yield _spread(ray, device)
    finally:
        if opened:
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raise OSError where nobody answers at a host and port; Ray itself would try for a minute and a half."""
    host, colon, port = (address or "").rpartition(":")
    if colon and "/" not in host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _own(address: str | None) -> dict[str, Any]:
    return {} if address else {"include_dashboard": False, "num_cpus": os.cpu_count()}


def _spread(ray: Any, device: torch.device) -> Spread:
    threads = torch.get_num_threads()
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    kind, wanted = ("GPU", 1) if device.type == "cuda" else ("CPU", threads)
    most = max((machine.get(kind, 0) for machine in machines), default=0)
    if not most:
        raise ConfigError(f"no machine of the Ray cluster has a {kind}", hint="ray start --num-cpus, or --device cpu")
    needs = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": min(wanted, most)}
    at_once = sum(int(machine.get(kind, 0) // min(wanted, most)) for machine in machines)
    ours = arithmetic(device)
    task = ray.remote(_work).options(max_retries=RETRIES, **needs)

    def spread(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        # Tensors that were stored last, kept as long as another item may share them: id -> (the tensor, its bytes).
        stored: OrderedDict[int, tuple[torch.Tensor, Any]] = OrderedDict()

        def store(tensor: torch.Tensor) -> Any:
            if tensor.nbytes < STORED_BYTES:
                return _bytes(tensor)
            if id(tensor) not in stored:
                stored[id(tensor)] = tensor, ray.put(_bytes(tensor))
            stored.move_to_end(id(tensor))
            return stored[id(tensor)][1]

        def submit(item: T) -> Callable[[], R]:
            value, tensors = _apart(item)
            result = task.remote(ours, threads, device.type, function, value, *map(store, tensors))
            while len(stored) > max(4 * (at_once + 1), len(tensors)):
                stored.popitem(last=False)
            return lambda: moved(_together(*_result(ray, result)), device)

        return in_order(submit, items, ahead=2 * at_once)

    return spread


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise AwqError(f"a Ray task was lost: {reason}", hint="the same command resumes the run") from error


def arithmetic(device: torch.device) -> str:
    """What the last bit of a sum depends on, for people to read."""
    cuda = device.type == "cuda"
    processor = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    return f"awq_core {__version__}, torch {torch.__version__}, {processor}"


def _work(
    driver: str, threads: int, device: str, function: Callable[[Any], Any], value: Any, *arrays: Any
) -> tuple[Any, list[Any]]:
    """What a task does, in a worker.

    Raises:
        ConfigError: the same work has another result here than in the driver.
    """
    torch.set_num_threads(threads)
    worker = arithmetic(torch.device(device))
    if worker != driver:
        raise ConfigError(f"a Ray worker has {worker}; the driver has {driver}", hint="the bytes would differ")
    result, tensors = _apart(function(moved(_together(value, arrays), torch.device(device))))
    return result, [_bytes(tensor) for tensor in tensors]


def _apart(value: T) -> tuple[T, list[torch.Tensor]]:
    """The value with slots in the place of its tensors, and these."""
    tensors: list[torch.Tensor] = []

    def take(tensor: torch.Tensor) -> _Slot:
        tensors.append(tensor)
        return _Slot(len(tensors) - 1, tensor.dtype, tensor.shape)

    return with_tensors(value, take), tensors


def _together(value: T, arrays: Any) -> T:
    """The other way; the tensors have memory of their own, which arrays from the object store do not."""

    def fill(slot: _Slot) -> torch.Tensor:
        return torch.tensor(arrays[slot.index]).view(slot.dtype).reshape(slot.shape)

    return with_tensors(value, fill, _Slot)


def _bytes(tensor: torch.Tensor) -> Any:
    """A tensor as numpy's uint8 [nbytes], which Ray stores as it is whatever the dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
