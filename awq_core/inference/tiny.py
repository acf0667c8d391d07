"""The model that is experimented on: the smallest of its class that can be built and run, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from awq_core.errors import AwqError, UnsupportedModelError
from awq_core.modules.unclaimed import Prepared, prepare_unclaimed
from awq_core.quantization.proof import TOLERANCE, logits_of, randomise, sample_batches, shrunk
from awq_core.quantization.shrink import shrunken
from awq_core.skeleton import build_skeleton

SMALL, LARGEST = 30_000_000, 500_000_000  # parameters of a model that is built to be run: 0.1 and 2 GB
MOST_LARGE = 2  # so many above `SMALL` are tried, after all that are below
WRITE = "write a plugin: docs/plugins/writing.md shows how"


def batches(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    return sample_batches(model, torch.Generator().manual_seed(0))


def tiny_model(config: Any, trust: bool, seed: int) -> tuple[Any, nn.Module, Prepared]:
    """The smallest configuration whose model runs, that model with its experts taken apart, and what those were."""
    failure: Exception | None = None
    large: list[Any] = []
    for candidate in chain(candidates(config), islice(large, MOST_LARGE)):
        try:
            model = build_skeleton(candidate, trust_remote_code=trust)
            size = sum(parameter.numel() for parameter in model.parameters())
            if size > SMALL and not any(candidate is one for one in large):
                large += [candidate] if size <= LARGEST else []
                continue
            randomise(model, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                batch = next(batches(model))
                before = logits_of(model, batch)
                if not torch.isfinite(before).all():
                    raise ValueError("the tiny model computes NaN or inf")
                prepared = prepare_unclaimed(model)
                if prepared and not _close(logits_of(model, batch), before):
                    prepared = Prepared()  # other experts, that look the same: left as they are
                    model = build_skeleton(candidate, trust_remote_code=trust)
                    randomise(model, torch.Generator().manual_seed(seed))
            return candidate, model, prepared
        except AwqError:
            raise
        except Exception as error:
            failure = failure or error
    line = next(iter(str(failure or "every small version is too large").strip().splitlines()), type(failure).__name__)
    raise UnsupportedModelError(
        f"model type {config.model_type!r}: no small model can be built and run: {line}", hint=WRITE
    ) from failure


def _close(after: torch.Tensor, before: torch.Tensor) -> bool:
    return bool((after - before).norm() <= TOLERANCE * before.norm())


def candidates(config: Any) -> Iterator[Any]:
    yield from shrunken(config)
    yield from shrunk(config)


def real_model(config: Any, prepared: Prepared, trust: bool) -> Any:
    """The model with its real widths, without weights; None where it cannot be built."""
    try:
        model = build_skeleton(config, trust_remote_code=trust)
        if prepared:
            prepare_unclaimed(model)
        return model
    except Exception:
        return None


def small_outputs(block: nn.Module, real: Any, path: str) -> frozenset[str]:
    """Linears of a block whose outputs are too few to be packed, in the real model where it has the block."""
    try:
        full = real.get_submodule(path)
        return frozenset(n for n, m in full.named_modules() if isinstance(m, nn.Linear) and m.out_features % 8)
    except AttributeError:
        return frozenset(n for n, m in block.named_modules() if isinstance(m, nn.Linear) and m.out_features < 8)
