"""The configuration that a generated test, or `awq plugins check`, runs: small, and with widths that groups of 32
divide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from awq_core.config import QuantConfig
from awq_core.hooks.manager import Owner, PluginManager
from awq_core.inference import InferredArchitecture
from awq_core.planning import make_plan
from awq_core.quantization.proof import TOLERANCE, logits_of, prove_model, randomise, sample_batches, shrunk
from awq_core.quantization.shrink import shrunken
from awq_core.skeleton import build_skeleton

GROUP_SIZE = 32
COVERAGE = 0.9
VOCABULARY = 128  # of the kit's tokenizer
LARGEST = 20_000_000


def config_for_tests(config: Any, found: InferredArchitecture) -> Any:
    """The smallest version of `config` whose model the plugin's tests can pass on, or the one that was searched."""
    manager = found.manager()
    (owner,) = manager.architectures
    return smallest_config(config, owner, manager, proved=True) or found.tiny


def smallest_config(config: Any, owner: Owner, manager: PluginManager, *, proved: bool = False) -> Any:
    """The smallest version of `config` that is covered, whose model runs; None where there is none.

    Args:
        proved: whether the scale groups must hold on it. Without, one that is not covered will do where
            none is: a plugin with a fault is tried too.
    """
    best: tuple[int, Any] | None = None
    uncovered: Any = None
    for candidate in _candidates(config):
        try:
            model = build_skeleton(candidate)
            manager.prepare_model(owner, model)
            size = sum(parameter.numel() for parameter in model.parameters())
            plan = make_plan(model, owner, manager, QuantConfig(group_size=GROUP_SIZE))
            covered = plan.coverage >= COVERAGE
            if size > LARGEST or not (covered or (not proved and uncovered is None)) or (best and size >= best[0]):
                continue
            randomise(model, torch.Generator().manual_seed(0))
            with torch.no_grad():
                logits_of(model, next(sample_batches(model, torch.Generator().manual_seed(0))))
            if not covered:
                uncovered = candidate
            elif not proved or prove_model(model, owner, manager).error <= TOLERANCE:
                best = (size, candidate)
        except Exception:  # this one cannot be built or run; another can
            continue
    return best[1] if best else uncovered


def _candidates(config: Any) -> Iterator[Any]:
    for source in (shrunken, shrunk):
        for candidate in source(config):
            candidate.get_text_config().vocab_size = VOCABULARY
            yield candidate
