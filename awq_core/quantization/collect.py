"""One forward pass of a block over the calibration tokens: Gram statistics of each distinct input.

The linears of a scale group read one tensor and share one Gram matrix; a linear outside every group has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from awq_core.calibration.statistics import Statistics, StatisticsAccumulator
from awq_core.calibration.trace import StackInputs
from awq_core.planning import BlockPlan


def collect(
    block: nn.Module, plan: BlockPlan, inputs: StackInputs, index: int, device: torch.device
) -> dict[str, Statistics]:
    """Statistics by linear (path relative to the block); the members of a scale group share one object.

    Raises:
        NumericsError: NaN or inf among the activations, naming the linear.
    """
    quantized = {linear.name.removeprefix(plan.path).removeprefix("."): linear for linear in plan.quantized}
    sites: dict[str, tuple[str, ...]] = {name: (name,) for name in quantized}
    for group in plan.groups:
        for name in group.layers:
            sites.pop(name, None)
        sites[group.observe] = group.layers
    accumulators = {
        site: StatisticsAccumulator(quantized[readers[0]].in_features, device) for site, readers in sites.items()
    }
    mask: list[torch.Tensor | None] = [None]

    def watch(site: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        # A linear is called with its input; a module that is observed instead may be given it by name.
        return lambda module, args, named: accumulators[site].add((*args, *named.values())[0], mask[0])

    handles = [block.get_submodule(site).register_forward_pre_hook(watch(site), with_kwargs=True) for site in sites]
    try:
        with torch.no_grad(), _calibrating(block):
            for batch, call in enumerate(inputs.calls[index]):
                mask[0] = inputs.masks[batch]
                call.run(block, inputs.hidden[batch])
    finally:
        for handle in handles:
            handle.remove()
    result: dict[str, Statistics] = {}
    for site, readers in sites.items():
        statistics = accumulators.pop(site).finish(f"{plan.path}.{site}".removesuffix("."))
        result.update(dict.fromkeys(readers, statistics))
    return result


@contextmanager
def _calibrating(block: nn.Module) -> Iterator[None]:
    """Every expert of a mixture runs on every token while statistics are collected."""
    modules: list[Any] = [module for module in block.modules() if hasattr(module, "calibrating")]
    for module in modules:
        module.calibrating = True
    try:
        yield
    finally:
        for module in modules:
            module.calibrating = False
