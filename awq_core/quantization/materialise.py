"""Filling a skeleton from disk, a module at a time, and emptying it again.

Blocks are filled whole while they are worked. Everything around them (embeddings, rotary tables, a vision tower) is
filled the moment it is called, so nobody has to list what a model reads before its first block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import CheckpointError, PlanError
from awq_core.skeleton import set_parameter, transposed_names


class Materialiser:
    """Puts a checkpoint's tensors into a skeleton's modules.

    Args:
        names: name in the model -> name on disk.
        device, dtype: where and in what the tensors are put.

    Attributes:
        overrides: tensors that replace the checkpoint's: blocks that are already quantized, by name in the model.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        model: PreTrainedModel,
        names: dict[str, str],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shared = {id(parameter): names[name] for name, parameter in model.named_parameters() if name in names}
        every = model.named_parameters(remove_duplicate=False)
        tied = {name: shared[id(parameter)] for name, parameter in every if id(parameter) in shared}
        self.reader, self.model, self.names = reader, model, {**tied, **names}
        self._transposed = transposed_names(model)
        self.device, self.dtype = device, dtype
        self.overrides: dict[str, torch.Tensor] = {}
        for name, buffer in list(model.named_buffers()):
            if name in self.names:  # stored beside the weights (a layer's multiplier, a router's bias): few and small
                self._require_shape(self.names[name], tuple(buffer.shape))
                set_parameter(model, name, reader.tensor(self.names[name], dtype=buffer.dtype))

    def verify(self, blocks: Iterable[str]) -> None:
        """Refuse, before any work, tensors of another shape or kind than the model's, and blocks that lack one.

        Raises:
            CheckpointError: naming the tensor.
        """
        inside = tuple(path + "." for path in blocks)
        for name, parameter in self.model.named_parameters():
            if name in self.names or name.startswith(inside):
                self._on_disk(name, parameter.shape)

    def turned(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter of the model as it is stored, or a stored one as the model has it."""
        return tensor.t().contiguous() if name in self._transposed else tensor

    @contextmanager
    def filled(self, module: nn.Module, path: str) -> Iterator[None]:
        """Fill a module and all below it; empty them afterwards."""
        loaded = [self._load(child, f"{path}.{name}" if name else path) for name, child in module.named_modules()]
        try:
            yield
        finally:
            for child, empty in loaded:
                child._parameters.update(empty)

    @contextmanager
    def filled_when_called(self, *, exclude: Iterable[str], prelude: Iterable[str] = ()) -> Iterator[None]:
        """Fill whatever module of the model is called, just before its first call; empty all of them afterwards.

        Args:
            exclude: paths never filled (blocks that are replaced by stubs).
            prelude: paths filled at once, because their weights are read without a call.

        Raises:
            PlanError: a module is called with a tensor on meta.
        """
        loaded: list[tuple[nn.Module, dict[str, nn.Parameter]]] = []
        handles = []
        exclude, prelude = tuple(exclude), tuple(prelude)

        def fill(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            if any(isinstance(one, torch.Tensor) and one.device.type == "meta" for one in args):
                # `x.to(module.weight.device)`, say; the result would be whatever is in memory
                raise PlanError(
                    f"{type(self.model).__name__} calls {path} with a tensor without values: it reads a weight of a "
                    "module before it calls it",
                    hint=f"name that module in LayerStack.prelude; often it is {path} itself",
                )
            loaded.append(self._load(module, path))

        for path, module in self.model.named_modules():
            if not module._parameters or _below(path, exclude):
                continue
            if _below(path, prelude):
                loaded.append(self._load(module, path))
            else:
                handles.append(module.register_forward_pre_hook(partial(fill, path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, empty in loaded:
                module._parameters.update(empty)

    def _load(self, module: nn.Module, path: str) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """Read a module's own parameters that are still on meta. Returns those on meta, to be put back: of two modules
        that share one they are the same, and say so."""
        empty = {name: p for name, p in module._parameters.items() if p is not None and p.device.type == "meta"}
        for name, parameter in empty.items():
            full = f"{path}.{name}" if path else name
            tensor = self.overrides.get(full)
            if tensor is None:
                stored = self._on_disk(full, parameter.shape)
                tensor = self.turned(full, self.reader.tensor(stored, device=self.device, dtype=self.dtype))
            set_parameter(module, name, tensor)
        return module, empty

    def _on_disk(self, name: str, shape: torch.Size) -> str:
        """The stored name of a parameter, proved to be there in this shape."""
        on_disk = self.names.get(name)
        if on_disk is None:
            raise CheckpointError(
                f"{self.reader.folder}: the checkpoint has no tensor for {name}",
                hint="is config.json the one these weights were made with?",
            )
        wanted = tuple(reversed(shape)) if name in self._transposed else tuple(shape)
        self._require_shape(on_disk, wanted)
        if not self.reader.dtype(on_disk).is_floating_point:
            raise CheckpointError(f"{on_disk} is {self.reader.dtype(on_disk)}, not a floating-point weight")
        return on_disk

    def _require_shape(self, on_disk: str, wanted: tuple[int, ...]) -> None:
        if self.reader.shape(on_disk) != wanted:
            raise CheckpointError(
                f"{on_disk} has shape {self.reader.shape(on_disk)}, the configuration says {wanted}",
                hint="is config.json the one these weights were made with?",
            )


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + ".") for root in roots)
