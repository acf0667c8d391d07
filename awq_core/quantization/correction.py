"""Correct for inputs that are quantized already: what a linear should compute of what it will really read.

Block after block the inputs drift from the original model's. With x what the original model feeds a linear and x̂ what
the quantized one does, the output that is wanted is W x and the output there will be is Ŵ x̂, so

    E‖W x − Ŵ x̂‖²  =  tr((Ŵ − W*) Ĥ (Ŵ − W*)ᵀ) + const,      W* = W + W D Ĥ⁻¹,     D = E[(x − x̂) x̂ᵀ],  Ĥ = E[x̂ x̂ᵀ]

and everything that rounds W can round the target W* instead (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). D is
an estimate from few tokens, and a target far from W is harder to round: only a share of the step is taken
(`strength`), and Ĥ is damped before it is inverted.

Two versions of the samples walk from block to block: what the original model makes of them, and what the quantized one
does. Both are fed to the block while it still has its original weights. What only one expert of a mixture reads is not
corrected: that would need both versions of every expert's input at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from awq_core.calibration.offload import load
from awq_core.calibration.stack import Batch, Keep, Runner, StackInputs, at_once
from awq_core.calibration.statistics import Statistics
from awq_core.gemm import times_transposed
from awq_core.passes import Site, passes
from awq_core.plan_types import BlockPlan

# Of the mean of diag(Ĥ), added to its diagonal.
DAMPENING = 1e-2


def drift(
    block: nn.Module, plan: BlockPlan, inputs: StackInputs, index: int, run: Runner = at_once
) -> dict[str, torch.Tensor]:
    """D of each distinct input outside the mixtures, `[in, in]` fp32, by linear; the readers of one input share it.

    Also advances `inputs.original` to the next block.

    Args:
        block: filled, with its original weights.
        inputs: with `original` set; `hidden` is not changed.
        run: makes the forward passes; the sums of its parts are added up in their order.
    """
    sites = tuple(site for one in passes(plan) if one.mixture is None for site in one.sites)
    parts = run(apart, block, inputs.batches(index), partial(inputs.keep_original, index), sites)
    total, tokens = next(parts)
    for matrices, counts in parts:
        for path, matrix in matrices.items():
            total[path] += matrix
            tokens[path] += counts[path]
    for path, matrix in total.items():
        matrix.div_(max(tokens[path], 1))
    return {name: total[site.module] for site in sites for name in site.readers}


@torch.no_grad()
def apart(
    block: nn.Module, batches: Iterable[Batch], keep: Keep, sites: tuple[Site, ...], /
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Σ (x − x̂) x̂ᵀ and the number of tokens, both by site, over some batches, and the original model's outputs; a
    `Function` of `calibration.stack`."""
    device = next(block.parameters()).device
    total = {site.module: torch.zeros(site.width, site.width, device=device) for site in sites}
    tokens = dict.fromkeys(total, 0)
    seen: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    mask: torch.Tensor | None = None

    def note(path: str, x: torch.Tensor) -> None:
        seen[path].append(x)

    def add(path: str, x: torch.Tensor) -> None:
        original, rows = (y.reshape(-1, y.shape[-1]).float() for y in (seen[path].pop(0), x))
        if mask is not None and mask.numel() == len(rows):
            original, rows = original[mask.reshape(-1)], rows[mask.reshape(-1)]
        total[path] += times_transposed((original - rows).T.contiguous(), rows.T.contiguous())
        tokens[path] += len(rows)

    for number, batch in enumerate(batches):
        mask = batch.mask
        assert batch.original is not None
        with _watched(block, sites, note):
            original = batch.call.run_original(block, load(batch.original))
        with _watched(block, sites, add):
            batch.call.run(block, load(batch.hidden))
        keep(number, original)
    return total, tokens


@contextmanager
def _watched(block: nn.Module, sites: Iterable[Site], tell: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """`tell` is given each site's path and input when it is called."""

    def watch(path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        return lambda module, args, named: tell(path, (*args, *named.values())[0])

    handles = [
        block.get_submodule(site.module).register_forward_pre_hook(watch(site.module), with_kwargs=True)
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steps(
    drifted: Mapping[str, torch.Tensor], statistics: Mapping[str, Statistics], strength: float
) -> dict[str, torch.Tensor]:
    """`strength` · (Ĥ + λI)⁻¹ Dᵀ of each linear that has both, `[in, in]`: W times its transpose is added to W.

    Readers of one input share it. None where there are no tokens, or the Gram matrix has no Cholesky factor.
    """
    made: dict[int, torch.Tensor | None] = {}
    for name in [name for name in statistics if name in drifted]:
        matrix, gram = drifted[name], statistics[name].gram
        if id(matrix) not in made:
            damped = gram.clone()
            damped.diagonal().add_(DAMPENING * gram.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(damped)
            made[id(matrix)] = None if failed else torch.cholesky_solve(matrix.T * strength, factor).contiguous()
    found = {name: made[id(drifted[name])] for name in statistics if name in drifted}
    return {name: step for name, step in found.items() if step is not None}
