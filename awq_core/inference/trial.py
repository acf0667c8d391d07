"""One block of a small model under experiment: fold a scale, run the model, see what moved.

    fold 1/s into P, s into the readers found so far   ->   logits, and the input of every module of the block

A module reads what P writes, channel for channel, if its input became exactly  x · (1/s).  That holds through copies,
reshapes, gathers (an expert's tokens), products with other tensors and attention's weighted sums, where the identity of
a tensor would be lost, and fails behind anything that is not linear in P. Whether the readers found are all there are,
the logits say: they must not have moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from awq_core.quantization.fold import apply_to_block
from awq_core.quantization.proof import TOLERANCE, logits_of
from awq_core.scale_groups import GroupPlan


@dataclass(slots=True)
class Seen:
    """What one run showed. `inputs` and `outputs`: path in the block -> one tensor a call. `chosen`: what was sorted or
    searched for its largest values inside the block, which is how a router chooses."""

    logits: list[torch.Tensor] = field(default_factory=list)
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    chosen: list[torch.Tensor] = field(default_factory=list)
    writers: dict[str, str] = field(default_factory=dict)

    def error(self, base: Seen) -> float:
        """Relative change of the logits, the largest over the batches; NaN counts as infinite."""
        errors = [(a - b).norm() / b.norm() for a, b in zip(self.logits, base.logits, strict=True)]
        error = float(torch.stack(errors).max())
        return error if error == error else float("inf")


class Trial:
    """A block, the model around it and the batches that run through it. Parameters are the same after every call."""

    def __init__(self, model: nn.Module, block: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
        self.model, self.block, self.batches = model, block, batches
        self.modules = {name: module for name, module in block.named_modules() if name}
        self.base = self.run(choices=True)

    def run(self, *, choices: bool = False) -> Seen:
        """The model as its parameters are now; `choices` notes what is sorted, which takes longer."""
        seen = Seen()
        written: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}
        handles: list[Any] = []
        mode = _Choices(seen.chosen)

        def before(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
                if tensors and tensors[0].is_floating_point():
                    seen.inputs.setdefault(name, []).append(tensors[0].detach().clone())
                    writer = written.get(_where(tensors[0]))
                    seen.writers.setdefault(name, writer[0] if writer else "")

            return hook

        def after(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
                if isinstance(out, torch.Tensor):
                    seen.outputs.setdefault(name, []).append(out.detach().clone())
                    written.setdefault(_where(out), (name, out))  # kept alive, so that its storage is not used again

            return hook

        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        if choices:
            handles.append(self.block.register_forward_pre_hook(lambda *_: mode.enter()))
            handles.append(self.block.register_forward_hook(lambda *_: mode.leave()))
        try:
            with torch.no_grad():
                seen.logits = [logits_of(self.model, batch) for batch in self.batches]
        finally:
            mode.leave()
            for handle in handles:
                handle.remove()
        return seen

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Parameters of the block may be changed in place inside, and are as they were after it."""
        saved = [(parameter, parameter.data.clone()) for parameter in self.block.parameters()]
        try:
            yield
        finally:
            for parameter, values in saved:
                parameter.data.copy_(values)

    def folded(self, group: GroupPlan, scale: torch.Tensor, also: tuple[tuple[str, int], ...] = ()) -> Seen:
        """A run with `scale` folded into a group. `also`: parameters, and the axis of each, that are multiplied too."""
        with self.unharmed():
            apply_to_block(self.block, group, scale)
            for name, axis in also:
                parameter = self.block.get_parameter(name)
                shape = [1] * parameter.ndim
                shape[axis] = -1
                parameter.data.mul_(scale.view(shape))
            return self.run()

    def multiplied(self, factors: dict[str, float], *, choices: bool = False) -> Seen:
        """A run with the outputs of some linears multiplied by constants."""
        with self.unharmed():
            for name, factor in factors.items():
                for parameter in self.modules[name].parameters(recurse=False):
                    parameter.data.mul_(factor)
            return self.run(choices=choices)

    def reads(self, seen: Seen, name: str, factor: torch.Tensor | float) -> bool:
        """Whether the input of `name` is the one of the first run, multiplied by `factor`, in every call."""
        return same(seen.inputs.get(name, []), self.base.inputs.get(name, []), factor)

    def writes(self, seen: Seen, name: str, factor: torch.Tensor | float) -> bool:
        """The same for its output."""
        return same(seen.outputs.get(name, []), self.base.outputs.get(name, []), factor)


def same(found: list[torch.Tensor], before: list[torch.Tensor], factor: torch.Tensor | float) -> bool:
    """Whether `found` is `before · factor` within the proof's tolerance, call for call."""
    if not before or len(found) != len(before):
        return False
    for now, then in zip(found, before, strict=True):
        if now.shape != then.shape or (isinstance(factor, torch.Tensor) and now.shape[-1] != factor.numel()):
            return False
        if not float((now - then * factor).norm()) <= TOLERANCE * float(then.norm()):
            return False
    return True


def _where(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


class _Choices(TorchDispatchMode):
    """Notes the input of every topk and sort while it is entered."""

    def __init__(self, found: list[torch.Tensor]) -> None:
        super().__init__()
        self.found, self.inside = found, False

    def enter(self) -> None:
        if not self.inside:
            self.inside = True
            self.__enter__()

    def leave(self) -> None:
        if self.inside:
            self.inside = False
            self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.topk, torch.ops.aten.sort, torch.ops.aten.argmax):
            self.found.append(args[0].detach().float().clone())
        return func(*args, **(kwargs or {}))
