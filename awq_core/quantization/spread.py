"""Where the independent work of a block is done: in this thread, on several devices, or on other machines.

Candidates of a scale group are scored linear by linear, and codes are chosen linear by linear: pure functions of the
weights, the statistics of their input and the settings. So all of it goes through one function with the meaning of
Python's `map`,

    spread(function, items)  ->  function(item) for each item, in order

and who does the work changes no byte of the result. Items are made as they are needed, a few ahead of the results, and
each is dropped when its result was taken: memory stays what the number of workers makes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Spread(Protocol):
    """`map`, done anywhere. `function` is one of a module, items and results are values that `with_tensors` walks; the
    function writes to no tensor of its item, which others may share."""

    def __call__(self, function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]: ...


def here(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
    """One after another, in this thread."""
    return map(function, items)


@contextmanager
def threads(devices: Sequence[torch.device]) -> Iterator[Spread]:
    """One thread a device; results come back to the first. Torch lets go of the interpreter while it computes."""
    idle: SimpleQueue[torch.device] = SimpleQueue()
    for device in devices:
        idle.put(device)
    home = devices[0]

    with ThreadPoolExecutor(len(devices), "awq-device") as pool:

        def spread(function: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
            def work(item: T) -> R:
                device = idle.get()
                try:
                    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                        return moved(function(moved(item, device)), home)
                finally:
                    idle.put(device)

            return in_order(lambda item: pool.submit(work, item).result, items, ahead=len(devices))

        yield spread


def in_order(submit: Callable[[T], Callable[[], R]], items: Iterable[T], *, ahead: int) -> Iterator[R]:
    """Results in order; while one is waited for, up to `ahead` later items are under way. `submit` begins an item and
    returns what waits for its result."""
    under_way: deque[Callable[[], R]] = deque()
    for item in items:
        under_way.append(submit(item))
        del item  # or its matrices stay while the next is made
        if len(under_way) > ahead:
            yield under_way.popleft()()
    while under_way:
        yield under_way.popleft()()


def moved(value: T, device: torch.device) -> T:
    """The value with its tensors on `device`; itself where they are."""
    return with_tensors(value, lambda tensor: tensor.to(device))


def with_tensors(value: T, change: Callable[[Any], Any], kind: type = torch.Tensor) -> T:
    """The value, with what `change` makes of each tensor in it, however deep in dataclasses, tuples, lists, dicts.

    Args:
        kind: what to change instead of tensors.
    """
    found: Any = value
    if isinstance(found, kind):
        found = change(found)
    elif is_dataclass(found) and not isinstance(found, type):
        parts = {field.name: getattr(found, field.name) for field in fields(found)}
        made = {name: with_tensors(part, change, kind) for name, part in parts.items()}
        changes = {name: part for name, part in made.items() if part is not parts[name]}
        found = replace(found, **changes) if changes else found
    elif isinstance(found, tuple | list):
        found = type(found)(with_tensors(part, change, kind) for part in found)
    elif isinstance(found, dict):
        found = {key: with_tensors(part, change, kind) for key, part in found.items()}
    return found
