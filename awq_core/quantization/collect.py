"""Forward passes of a block over the calibration tokens: Gram statistics of each distinct input.

The linears of a scale group read one tensor and share one Gram matrix; a linear outside every group has its own. A
block with a mixture of experts is observed in several passes (`awq_core.passes`), and each begins only when the caller
asks for it: what it has dropped until then is not in memory beside the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from awq_core.calibration.offload import load
from awq_core.calibration.statistics import Statistics, StatisticsAccumulator
from awq_core.calibration.trace import StackInputs
from awq_core.devices import release_freed_memory
from awq_core.passes import Pass, passes
from awq_core.plan_types import BlockPlan


class _Enough(Exception):
    """Nothing after this is observed in this pass."""


def collect(
    block: nn.Module, plan: BlockPlan, inputs: StackInputs, index: int, device: torch.device
) -> Iterator[dict[str, Statistics]]:
    """Statistics by linear (path relative to the block), pass by pass; the members of a scale group share one object.

    The block must compute what it computed at the first pass until the last is done.

    Raises:
        NumericsError: NaN or inf among the activations, naming the linear.
    """
    for one in passes(plan):
        yield _observe(block, plan, one, inputs, index, device)
        release_freed_memory()


def _observe(
    block: nn.Module, plan: BlockPlan, one: Pass, inputs: StackInputs, index: int, device: torch.device
) -> dict[str, Statistics]:
    accumulators = {site.module: StatisticsAccumulator(site.width, device) for site in one.sites}
    mask: list[torch.Tensor | None] = [None]
    calls: Counter[str] = Counter()
    usual: Counter[str] = Counter()

    def watch(site: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def add(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            # A linear is called with its input; a module that is observed instead may be given it by name.
            accumulators[site].add((*args, *named.values())[0], mask[0])
            calls[site] += 1
            if calls == usual:
                raise _Enough

        return add

    handles = [
        block.get_submodule(site.module).register_forward_pre_hook(watch(site.module), with_kwargs=True)
        for site in one.sites
    ]
    try:
        with torch.no_grad(), _calibrating(block, one):
            for batch, call in enumerate(inputs.calls[index]):
                mask[0] = inputs.masks[batch]
                with suppress(_Enough):
                    call.run(block, load(inputs.hidden[batch]))
                if batch == 0 and len(calls) == len(one.sites):
                    # Later batches end with the last input that the first one showed, before the last linear runs.
                    usual.update(calls)
                calls.clear()
    finally:
        for handle in handles:
            handle.remove()
    result: dict[str, Statistics] = {}
    for site in one.sites:
        statistics = accumulators.pop(site.module).finish(f"{plan.path}.{site.module}".removesuffix("."))
        result.update(dict.fromkeys(site.readers, statistics))
    return result


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
