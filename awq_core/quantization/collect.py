"""Forward passes of a block over the calibration tokens: Gram statistics of each distinct input.

The linears of a scale group read one tensor and share one Gram matrix; a linear outside every group has its own. A
block with a mixture of experts is observed in several passes (`awq_core.passes`), and each begins only when the caller
asks for it: what it has dropped until then is not in memory beside the next.

Every token is sent to the experts that are observed, and those that the router would have sent are counted a second
time, weighted by the expert's gate (`calibration/statistics.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from awq_core.calibration.offload import load
from awq_core.calibration.stack import Batch, Keep, Runner, StackInputs, at_once, nowhere
from awq_core.calibration.statistics import Statistics, Sums
from awq_core.devices import release_freed_memory
from awq_core.passes import Pass, Site, passes
from awq_core.plan_types import BlockPlan


class _Enough(Exception):
    """Nothing after this is observed in this pass."""


# Of the sites of a pass, by the module that is observed: over all tokens, and over an expert's own.
Observed = tuple[dict[str, Sums], dict[str, Sums]]


def collect(
    block: nn.Module, plan: BlockPlan, inputs: StackInputs, index: int, run: Runner = at_once
) -> Iterator[dict[str, Statistics]]:
    """Statistics by linear (path relative to the block), pass by pass, each linear once.

    Members of a scale group share one object; experts that do share its tensors, and have their `own` beside them. The
    block must compute what it computed at the first pass until the last is done.

    Args:
        run: makes the forward passes; the sums of its parts are added up in their order.

    Raises:
        NumericsError: NaN or inf among the activations, naming the linear.
    """
    waiting: dict[str, Statistics] = {}
    for one in passes(plan):
        everything, routed = _added_up(run(observe, block, inputs.batches(index), nowhere, one))
        own = one.routed if routed else ()
        _mix(waiting, one, _finished(plan, one.sites, everything), _finished(plan, own, routed))
        yield {name: waiting.pop(name) for name in one.complete}
        release_freed_memory()


@torch.no_grad()
def observe(block: nn.Module, batches: Iterable[Batch], keep: Keep, one: Pass, /) -> Observed:
    """The sums of a pass over some batches; a `Function` of `calibration.stack`."""
    device = next(block.parameters()).device
    mixture: Any = block.get_submodule(one.mixture) if one.mixture is not None else None
    gated = hasattr(mixture, "gate_weights")
    everything = {site.module: Sums.zeros(site.width, device) for site in one.sites}
    routed = {site.module: Sums.zeros(site.width, device) for site in one.routed if gated}
    modules = list(dict.fromkeys((*everything, *routed)))
    gates: dict[str, torch.Tensor] = {}
    mask: list[torch.Tensor | None] = [None]
    calls: Counter[str] = Counter()
    usual: Counter[str] = Counter()

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            # A linear is called with its input; a module that is observed instead may be given it by name.
            x = (*args, *named.values())[0]
            if path in everything:
                everything[path].add(x, mask[0])
            if path in routed:
                routed[path].add(x, mask[0], gates[one.expert(path)])
            calls[path] += 1
            if calls == usual:
                raise _Enough

        return add

    def route(mixture: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        gates.update((expert, mixture.gate_weights(expert, *args, **named)) for expert in one.experts)

    handles = [block.get_submodule(path).register_forward_pre_hook(watch(path), with_kwargs=True) for path in modules]
    if gated:
        handles.append(mixture.register_forward_pre_hook(route, with_kwargs=True))
    try:
        with _calibrating(block, one):
            for number, batch in enumerate(batches):
                mask[0] = batch.mask
                with suppress(_Enough):
                    batch.call.run(block, load(batch.hidden))
                if number == 0 and len(calls) == len(modules):
                    # Later batches end with the last input that the first one showed, before the last linear runs.
                    usual.update(calls)
                calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    return everything, routed


def _added_up(parts: Iterator[Observed]) -> Observed:
    """The sums over the tokens of all parts, in the memory of the first."""
    whole = next(parts)
    for part in parts:
        for mine, theirs in zip(whole, part, strict=True):
            for path, sums in theirs.items():
                mine[path].merge_(sums)
    return whole


def _finished(plan: BlockPlan, sites: Iterable[Site], sums: dict[str, Sums]) -> dict[str, Statistics]:
    """Statistics by linear; takes the sums out, or their matrices would exist twice."""
    found: dict[str, Statistics] = {}
    for site in sites:
        statistics = sums.pop(site.module).finish(f"{plan.path}.{site.module}".removesuffix("."))
        found.update(dict.fromkeys(site.readers, statistics))
    return found


def _mix(
    waiting: dict[str, Statistics], one: Pass, everything: dict[str, Statistics], own: dict[str, Statistics]
) -> None:
    """Add to `waiting` what a pass observed. Where the all-token statistics are one expert's alone they are mixed at
    once; where others read them too they stay, and the expert's own go with them."""
    waiting.update(everything)
    alone = {site.readers for site in one.sites}
    for readers in (site.readers for site in one.routed):
        if readers[0] in own:
            mine, shared = own[readers[0]], waiting[readers[0]]
            mixed = mine.towards_(shared) if readers in alone else replace(shared, own=mine, routed=mine.n)
            waiting.update(dict.fromkeys(readers, mixed))


@contextmanager
def _calibrating(block: nn.Module, one: Pass) -> Iterator[None]:
    """The pass's experts run on every token, the mixture's other experts not at all, and nothing after the mixture."""
    if one.mixture is None:
        yield
        return

    def stop(*called: Any) -> None:
        raise _Enough

    mixture: Any = block.get_submodule(one.mixture)
    mixture.calibrating = one.experts
    handle = mixture.register_forward_hook(stop)
    try:
        yield
    finally:
        mixture.calibrating = ()
        handle.remove()
