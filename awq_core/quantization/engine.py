"""The walk over the blocks: load one, collect statistics, quantize, write, feed the next.

    reader --block i--> materialise -> forward: Gram statistics -> quantize_block -> writer
                                    -> forward the finished block: the next block's input

One block is in memory at a time, whatever the depth. Tensors the walk does not touch are copied from disk to disk
unchanged, under their own names.

Each finished block is committed to the writer's journal. A run that finds blocks already committed does not search
them again: it reads their codes back and forwards the samples through them, which gives the next block bit for bit the
input it would have had. The output head, where it is asked for, is one more such step after the last block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.offload import OffloadFile
from awq_core.calibration.stack import Runner, StackInputs, at_once
from awq_core.calibration.trace import record
from awq_core.checkpoint.pack import PackedLinear, dequantize
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.devices import memory_bytes, peak_bytes, release_freed_memory
from awq_core.errors import CalibrationError, PlanError
from awq_core.plan_types import BlockPlan, HeadPlan, Plan
from awq_core.quantization.block import LinearReport, QuantizedBlock, quantize_block
from awq_core.quantization.collect import collect
from awq_core.quantization.correction import drift
from awq_core.quantization.head import observe, quantize_head
from awq_core.quantization.materialise import Materialiser
from awq_core.quantization.reuse import Found, to_payload
from awq_core.quantization.spread import Spread, here


@dataclass(frozen=True, slots=True)
class BlockDone:
    """Progress: one block is finished. Losses are sums over its linears, None without calibration; memory is what the
    process holds now, and the most of a CUDA device."""

    path: str
    done: int
    total: int
    seconds: float
    loss_rtn: float | None
    loss: float | None
    memory_bytes: int


Progress = Callable[[BlockDone], None]
REST = "everything outside the blocks"


class Engine:
    """Quantizes one checkpoint according to a plan.

    Args:
        model: the skeleton, after `awq_prepare_model`; it is filled and emptied block by block.
        names: name in the model -> name on disk.
        device: where blocks and searches live.
        step_dtype: dtype scales are stored in.
        offload: where activations are kept between blocks, instead of in memory.
        found: an earlier run, whose scales and ranges are taken instead of searching.
        spread: does the independent work of a block.
        run: makes the forward passes of blocks.

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
        offload: OffloadFile | None = None,
        found: Found | None = None,
        spread: Spread = here,
        run: Runner = at_once,
    ) -> None:
        self.offload, self.found, self.spread, self.forward = offload, found, spread, run
        self.reader, self.model, self.names, self.plan = reader, model, names, plan
        self.device, self.step_dtype = device, step_dtype
        self.source = Materialiser(reader, model, names, device=device, dtype=next(model.parameters()).dtype)
        self.source.verify(block.path for block in plan.blocks if block.quantized)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def run(
        self, data: CalibrationData | None, writer: CheckpointWriter, progress: Progress | None = None
    ) -> list[LinearReport]:
        """Quantize every stack, write every tensor; returns a report a linear."""
        reports: list[LinearReport] = []
        written: set[str] = set()
        head = self.plan.head
        total = sum(bool(block.quantized) for block in self.plan.blocks) + (head is not None)
        done = 0

        def finished(path: str, started: float) -> None:
            nonlocal done
            record = writer.finished[path]
            found = [LinearReport(**report) for report in record["reports"]]
            written.update(record["replaced"])
            reports.extend(found)
            done += 1
            release_freed_memory()
            if progress:
                seconds = time.perf_counter() - started
                progress(BlockDone(path, done, total, seconds, *_totals(found), memory_bytes(self.device)))

        stacks = _stacks(self.plan.blocks, last_whole=head is not None)
        for stack in stacks:
            last = head if stack is stacks[-1] else None
            names = [plan.path for plan in stack if plan.quantized] + ([last.linear.name] if last else [])
            left = any(name not in writer.finished for name in names)
            inputs = self._trace(stack, data) if left else None
            if inputs and last:
                inputs.feeds = True
            for index, plan in enumerate(stack):
                started = time.perf_counter()
                block = self.model.get_submodule(plan.path)
                if not plan.quantized:
                    if inputs:
                        with self.source.filled(block, plan.path):
                            if inputs.original:
                                inputs.advance_original(index, block, self.forward)
                            inputs.advance(index, block, self.forward)
                    continue
                if plan.path not in writer.finished:
                    self._quantize(block, plan, inputs, index, writer)
                else:
                    self._restore(block, plan, inputs, index, writer)
                finished(plan.path, started)
            if last:
                started = time.perf_counter()
                if last.linear.name not in writer.finished:
                    self._quantize_head(last, stack, inputs, data, writer)
                finished(last.linear.name, started)
        if REST not in writer.finished:
            for name in self.reader.names:
                if name not in written:
                    writer.add(name, self.reader.tensor(name))
            writer.commit(REST, {})
        return reports

    def _quantize(
        self,
        block: nn.Module,
        plan: BlockPlan,
        inputs: StackInputs | None,
        index: int,
        writer: CheckpointWriter,
    ) -> None:
        started = time.perf_counter()
        with self.source.filled(block, plan.path):
            result = self.search(block, plan, inputs, index)
            payload = {
                "replaced": self._write(block, plan, result, writer),
                "reports": [asdict(report) for report in result.reports],
                "scales": to_payload(result.scales),
                "cost": self._cost(started),
            }
            writer.commit(plan.path, payload)
            self._hand_on(block, plan, inputs, index)

    def search(self, block: nn.Module, plan: BlockPlan, inputs: StackInputs | None, index: int) -> QuantizedBlock:
        """Decide on scales, ranges and codes of a filled block, and quantize it in place."""
        drifted = drift(block, plan, inputs, index, self.forward) if inputs and inputs.original else {}
        statistics = collect(block, plan, inputs, index, self.forward) if inputs else ()
        stored = {
            name: self.reader.dtype(self.names[name])
            for name in (f"{plan.path}.{local}" for local, _ in block.named_parameters())
        }
        config, dtype = self.plan.config, self.step_dtype
        return quantize_block(block, plan, statistics, config, dtype, stored, self.found, drifted, self.spread)

    def _quantize_head(
        self,
        head: HeadPlan,
        stack: list[BlockPlan],
        inputs: StackInputs | None,
        data: CalibrationData | None,
        writer: CheckpointWriter,
    ) -> None:
        name, started = head.linear.name, time.perf_counter()
        statistics = None
        if inputs and data:
            blocks = [self.model.get_submodule(plan.path) for plan in stack]
            with self.around((*(plan.path for plan in stack), name)):
                statistics = observe(self.model, blocks, inputs, data.batches, head, self.device)
        own = self.names.get(f"{name}.weight")
        source = own or self.names[head.tied]

        def read(start: int, end: int) -> torch.Tensor:
            return self.reader.tensor(source, rows=(start, end), device=self.device, dtype=torch.float32)

        config, linear = self.plan.config, head.linear
        known = None
        if self.found and config.clip != "none":
            known = self.found.grid(name, linear.in_features // linear.group_size, self.device)
        packed, report = quantize_head(head, read, statistics, config, self.step_dtype, known=known)
        _add_packed(writer, own or f"{name}.weight", packed)
        replaced = [own] if own else []
        writer.commit(name, {"replaced": replaced, "reports": [asdict(report)], "cost": self._cost(started)})

    def _cost(self, started: float) -> dict[str, float]:
        """What a block took so far: seconds, bytes held now, and the most bytes of the process until now."""
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "bytes": memory_bytes(self.device), "peak": peak_bytes(self.device)}

    def _restore(
        self, block: nn.Module, plan: BlockPlan, inputs: StackInputs | None, index: int, writer: CheckpointWriter
    ) -> None:
        """Fill a block that an earlier run finished with what that run wrote, where anything still reads it."""
        if inputs is None and plan.component == "language":
            return
        stored = writer.stored(plan.path)
        with self.source.filled(block, plan.path):
            if inputs and inputs.original:
                inputs.advance_original(index, block, self.forward)
            for name, parameter in block.named_parameters():
                on_disk = self.names[f"{plan.path}.{name}"]
                base = on_disk.removesuffix("weight")
                if base + "qweight" in stored:
                    packed = PackedLinear(*(stored[base + part] for part in ("qweight", "qzeros", "scales")))
                    parameter.data.copy_(dequantize(packed))
                elif on_disk in stored:
                    parameter.data.copy_(self.source.turned(f"{plan.path}.{name}", stored[on_disk]))
            self._hand_on(block, plan, inputs, index)

    def _hand_on(self, block: nn.Module, plan: BlockPlan, inputs: StackInputs | None, index: int) -> None:
        """Feed the finished block's outputs to whatever comes next."""
        if plan.component != "language":
            # The language blocks are traced through the finished components.
            self.source.overrides.update({f"{plan.path}.{n}": p.data for n, p in block.named_parameters()})
        if inputs:
            inputs.advance(index, block, self.forward)

    def _trace(self, stack: list[BlockPlan], data: CalibrationData | None) -> StackInputs | None:
        """The inputs of the stack's blocks, or None when the configuration needs no calibration."""
        if not self.plan.config.needs_calibration or data is None:
            return None
        inputs = self.trace(stack, data.batches)
        if self.plan.config.correct_inputs:
            inputs.fork()
        return inputs

    def trace(self, stack: Sequence[BlockPlan], batches: Sequence[dict[str, torch.Tensor]]) -> StackInputs:
        """The inputs of the stack's blocks.

        Raises:
            PlanError: the model calls its blocks, or reads weights before them, in a way that cannot be followed.
            CalibrationError: no batch reaches the stack.
        """
        blocks = [self.model.get_submodule(block.path) for block in stack]
        with self.around([block.path for block in stack]):
            try:
                inputs = record(self.model, blocks, batches, device=self.device, offload=self.offload)
            except (RuntimeError, NotImplementedError) as error:
                if "meta" not in str(error):
                    raise
                raise PlanError(
                    f"{type(self.model).__name__} reads a weight, before {stack[0].path}, of a module it does not call",
                    hint="name that module in LayerStack.prelude",
                ) from error
        if not inputs.hidden or not any(inputs.calls):
            raise CalibrationError(
                f"no calibration sample reaches {stack[0].path}",
                hint=f"give image and text samples, or keep it: --component {stack[0].component}=keep",
            )
        return inputs

    def around(self, exclude: Iterable[str]) -> AbstractContextManager[None]:
        """Everything a forward of the model calls is filled when it is, but for the modules at these paths."""
        prelude = [path for declared in self.plan.stacks for path in declared.prelude]
        return self.source.filled_when_called(exclude=exclude, prelude=prelude)

    def _write(self, block: nn.Module, plan: BlockPlan, result: QuantizedBlock, writer: CheckpointWriter) -> list[str]:
        """Add the block's changed tensors under their on-disk names; returns the names they replace."""
        replaced: list[str] = []
        for name, packed in result.packed.items():
            weight = self.names[f"{name}.weight"]
            _add_packed(writer, weight, packed)
            replaced.append(weight)
        parameters = {f"{plan.path}.{name}": parameter for name, parameter in block.named_parameters()}
        for name in sorted(result.changed):
            on_disk = self.names[name]
            value = self.source.turned(name, parameters[name].data)
            writer.add(on_disk, value.to("cpu", self.reader.dtype(on_disk)))
            replaced.append(on_disk)
        return replaced


def _add_packed(writer: CheckpointWriter, weight: str, packed: PackedLinear) -> None:
    """Add a linear's tensors in the place of `weight`, its name on disk."""
    base = weight.removesuffix("weight")
    writer.add(base + "qweight", packed.qweight)
    writer.add(base + "qzeros", packed.qzeros)
    writer.add(base + "scales", packed.scales)


def _stacks(blocks: Iterable[BlockPlan], *, last_whole: bool = False) -> list[list[BlockPlan]]:
    """Blocks by stack, up to the last that is quantized, other components before language: language is calibrated on
    what they will really feed it. `last_whole` takes all blocks of the last stack: something reads what they give."""
    stacks: dict[str, list[BlockPlan]] = {}
    for block in blocks:
        stacks.setdefault(f"{block.component}:{block.path.rpartition('.')[0]}", []).append(block)
    ordered = sorted(stacks.values(), key=lambda stack: stack[0].component == "language")
    ends = [max((i for i, b in enumerate(stack, 1) if b.quantized), default=0) for stack in ordered]
    if last_whole:
        ends[-1] = len(ordered[-1])
    return [stack[:end] for stack, end in zip(ordered, ends, strict=True) if end]


def _totals(reports: list[LinearReport]) -> tuple[float | None, float | None]:
    if any(report.loss is None for report in reports):
        return None, None
    return sum(r.loss_rtn or 0.0 for r in reports), sum(r.loss or 0.0 for r in reports)
