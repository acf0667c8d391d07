"""The walk over the blocks: load one, collect statistics, quantize, write, feed the next.

    reader --block i--> materialise -> forward: Gram statistics -> quantize_block -> writer
                                    -> forward the finished block: the next block's input

One block is in memory at a time, whatever the depth. Tensors the walk does not touch are copied from disk to disk
unchanged, under their own names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.statistics import Statistics, StatisticsAccumulator
from awq_core.calibration.trace import StackInputs, record
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import CalibrationError, CheckpointError
from awq_core.planning import BlockPlan, Plan
from awq_core.quantization.block import LinearReport, QuantizedBlock, quantize_block
from awq_core.skeleton import set_parameter


@dataclass(frozen=True, slots=True)
class BlockDone:
    """Progress: one block is finished. Losses are sums over its linears, None without calibration."""

    path: str
    done: int
    total: int
    seconds: float
    loss_rtn: float | None
    loss: float | None


Progress = Callable[[BlockDone], None]


class Engine:
    """Quantizes one checkpoint according to a plan.

    Args:
        model: the skeleton, after `awq_prepare_model`; it is filled and emptied block by block.
        names: name in the model -> name on disk.
        device: where blocks and searches live.
        step_dtype: dtype scales are stored in.

    Raises:
        CheckpointError: the checkpoint lacks a tensor of a block, or holds one in another shape or kind.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        model: PreTrainedModel,
        names: dict[str, str],
        plan: Plan,
        *,
        device: torch.device,
        step_dtype: torch.dtype,
    ) -> None:
        self.reader, self.model, self.names, self.plan = reader, model, names, plan
        self.device, self.step_dtype = device, step_dtype
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self.finished: dict[str, torch.Tensor] = {}  # other components' new weights, needed to trace the next stack
        for buffer_owner in model.modules():
            for name, buffer in buffer_owner._buffers.items():
                if buffer is not None:
                    buffer_owner._buffers[name] = buffer.to(device)
        self._verify()

    def run(
        self, data: CalibrationData | None, writer: CheckpointWriter, progress: Progress | None = None
    ) -> list[LinearReport]:
        """Quantize every stack, write every tensor; returns a report a linear."""
        reports: list[LinearReport] = []
        written: set[str] = set()
        total = sum(bool(block.quantized) for block in self.plan.blocks)
        done = 0
        for stack in _stacks(self.plan.blocks):
            inputs = self._trace(stack, data)
            for index, block_plan in enumerate(stack):
                started = time.perf_counter()
                block = self.model.get_submodule(block_plan.path)
                if not block_plan.quantized:
                    self._pass_through(block, block_plan.path, inputs, index)
                    continue
                with self._loaded(block, block_plan.path):
                    statistics = self._collect(block, block_plan, inputs, index) if inputs else {}
                    result = quantize_block(block, block_plan, statistics, self.plan.config, self.step_dtype)
                    written |= self._write(block, block_plan, result, writer)
                    if block_plan.component != "language":
                        self._remember(block, block_plan)
                    if inputs:
                        with torch.no_grad():
                            inputs.advance(index, block)
                reports += result.reports
                done += 1
                if progress:
                    seconds = time.perf_counter() - started
                    progress(BlockDone(block_plan.path, done, total, seconds, *_totals(result.reports)))
        for name in self.reader.names:
            if name not in written:
                writer.add(name, self.reader.tensor(name))
        return reports

    def _verify(self) -> None:
        """Refuse, before any work, tensors of another shape or kind than the model's, and blocks that lack one."""
        inside = tuple(block.path + "." for block in self.plan.blocks if block.quantized)
        for name, parameter in self.model.named_parameters():
            if name in self.names or name.startswith(inside):
                self._on_disk(name, parameter.shape)

    def _pass_through(self, block: nn.Module, path: str, inputs: StackInputs | None, index: int) -> None:
        """A block that is kept still computes what the next one reads."""
        if inputs:
            with self._loaded(block, path), torch.no_grad():
                inputs.advance(index, block)

    def _trace(self, stack: list[BlockPlan], data: CalibrationData | None) -> StackInputs | None:
        """The inputs of the stack's blocks, or None when the configuration needs no calibration."""
        if not self.plan.config.needs_calibration or data is None:
            return None
        blocks = [self.model.get_submodule(block.path) for block in stack]
        with self._lazily_loaded(exclude={block.path for block in stack}):
            inputs = record(self.model, blocks, data.batches, device=self.device)
        if not inputs.hidden or not any(inputs.calls):
            raise CalibrationError(
                f"no calibration sample reaches {stack[0].path}",
                hint=f"give image and text samples, or keep it: --component {stack[0].component}=keep",
            )
        return inputs

    def _collect(self, block: nn.Module, plan: BlockPlan, inputs: StackInputs, index: int) -> dict[str, Statistics]:
        """Statistics by linear (path relative to the block); the members of a scale group share one object."""
        quantized = {linear.name.removeprefix(plan.path).removeprefix("."): linear for linear in plan.quantized}
        sites: dict[str, tuple[str, ...]] = {name: (name,) for name in quantized}
        for group in plan.groups:
            for name in group.layers:
                sites.pop(name, None)
            sites[group.observe] = group.layers
        accumulators = {
            site: StatisticsAccumulator(quantized[readers[0]].in_features, self.device)
            for site, readers in sites.items()
        }
        mask: list[torch.Tensor | None] = [None]

        def watch(site: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            return lambda module, args: accumulators[site].add(args[0], mask[0])

        handles = [block.get_submodule(site).register_forward_pre_hook(watch(site)) for site in sites]
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

    def _write(self, block: nn.Module, plan: BlockPlan, result: QuantizedBlock, writer: CheckpointWriter) -> set[str]:
        """Add the block's changed tensors under their on-disk names; returns the names taken care of."""
        taken: set[str] = set()
        for name, packed in result.packed.items():
            weight = self.names[f"{name}.weight"]
            base = weight.removesuffix("weight")
            writer.add(base + "qweight", packed.qweight)
            writer.add(base + "qzeros", packed.qzeros)
            writer.add(base + "scales", packed.scales)
            taken.add(weight)
        parameters = {f"{plan.path}.{name}": parameter for name, parameter in block.named_parameters()}
        for name in sorted(result.changed):
            on_disk = self.names[name]
            writer.add(on_disk, parameters[name].data.to("cpu", self.reader.dtype(on_disk)))
            taken.add(on_disk)
        return taken

    def _remember(self, block: nn.Module, plan: BlockPlan) -> None:
        for name, parameter in block.named_parameters():
            self.finished[f"{plan.path}.{name}"] = parameter.data

    @contextmanager
    def _loaded(self, block: nn.Module, path: str) -> Iterator[None]:
        """Fill a block from disk; empty it again afterwards."""
        loaded = [self._load(module, f"{path}.{name}" if name else path) for name, module in block.named_modules()]
        try:
            yield
        finally:
            for module, names in loaded:
                _empty(module, names)

    @contextmanager
    def _lazily_loaded(self, exclude: set[str]) -> Iterator[None]:
        """Fill whatever module is called, just before its first call; empty all of them afterwards."""
        loaded: list[tuple[nn.Module, list[str]]] = []
        handles = []
        preludes = [path for stack in self.plan.stacks for path in stack.prelude]
        for path, module in self.model.named_modules():
            if any(path == block or path.startswith(block + ".") for block in exclude) or not module._parameters:
                continue
            if any(path == prelude or path.startswith(prelude + ".") for prelude in preludes):
                loaded.append(self._load(module, path))
            else:
                hook = lambda module, args, path=path: loaded.append(self._load(module, path))  # noqa: E731
                handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, names in loaded:
                _empty(module, names)

    def _load(self, module: nn.Module, path: str) -> tuple[nn.Module, list[str]]:
        """Read a module's own parameters that are still on meta."""
        empty = {name: p for name, p in module._parameters.items() if p is not None and p.device.type == "meta"}
        for name, parameter in empty.items():
            full = f"{path}.{name}" if path else name
            tensor = self.finished.get(full)
            if tensor is None:
                tensor = self._read(full, parameter.shape)
            set_parameter(module, name, tensor)
        return module, list(empty)

    def _read(self, name: str, shape: torch.Size) -> torch.Tensor:
        return self.reader.tensor(self._on_disk(name, shape), device=self.device, dtype=self.dtype)

    def _on_disk(self, name: str, shape: torch.Size) -> str:
        """The stored name of a parameter, proved to be there in this shape."""
        on_disk = self.names.get(name)
        if on_disk is None:
            raise CheckpointError(
                f"{self.reader.folder}: the checkpoint has no tensor for {name}",
                hint="is config.json the one these weights were made with?",
            )
        if self.reader.shape(on_disk) != tuple(shape):
            raise CheckpointError(
                f"{on_disk} has shape {self.reader.shape(on_disk)}, the configuration says {tuple(shape)}",
                hint="is config.json the one these weights were made with?",
            )
        if not self.reader.dtype(on_disk).is_floating_point:
            raise CheckpointError(f"{on_disk} is {self.reader.dtype(on_disk)}, not a floating-point weight")
        return on_disk


def _empty(module: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        set_parameter(module, name, module.get_parameter(name).data.to("meta"))


def _stacks(blocks: Iterable[BlockPlan]) -> list[list[BlockPlan]]:
    """Blocks by stack, up to the last that is quantized, other components before language: language is calibrated on
    what they will really feed it."""
    stacks: dict[str, list[BlockPlan]] = {}
    for block in blocks:
        stacks.setdefault(f"{block.component}:{block.path.rpartition('.')[0]}", []).append(block)
    ends = {name: max((i for i, b in enumerate(stack, 1) if b.quantized), default=0) for name, stack in stacks.items()}
    worked = [stack[: ends[name]] for name, stack in stacks.items() if ends[name]]
    return sorted(worked, key=lambda stack: stack[0].component == "language")


def _totals(reports: list[LinearReport]) -> tuple[float | None, float | None]:
    if any(report.loss is None for report in reports):
        return None, None
    return sum(r.loss_rtn or 0.0 for r in reports), sum(r.loss or 0.0 for r in reports)


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
