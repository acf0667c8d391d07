"""Where the decoder blocks are: the list of modules that a pass over text walks through, one after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def decoder_blocks(model: nn.Module, logits: Any) -> str:
    """Path of the `ModuleList` of decoder blocks; empty where no list is one.

    Of the lists whose members `logits` (a function that runs the model) calls in order, once each, that are no part of
    another such list, the one with the most weights, lists as long as the configuration says before others.
    """
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name)) for name, module in _members(model)
    ]
    try:
        with torch.no_grad():
            logits(model)
    finally:
        for handle in handles:
            handle.remove()
    text = getattr(model.config, "get_text_config", lambda: model.config)()
    depth = getattr(text, "num_hidden_layers", None)
    candidates: list[tuple[bool, int, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            called = [name for name in order if name.rpartition(".")[0] == path]
            inside = any(path.startswith(f"{other}.") for *_, other in candidates)
            if called == [f"{path}.{index}" for index in range(len(module))] and not inside:
                weights = sum(p.numel() for p in module.parameters() if p.ndim > 1)
                candidates.append((len(module) == depth, weights, path))
    return max(candidates)[2] if candidates else ""


def _members(model: nn.Module) -> list[tuple[str, nn.Module]]:
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [(f"{path}.{index}", member) for path, module in lists for index, member in enumerate(module)]
