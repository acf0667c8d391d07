"""What 4 bits in one linear would cost the model, on the scale of its loss, from one backward pass.

Let y = W x be a linear's output, δ = Ŵ − W its error and g = ∂L/∂y, with L the negative log-likelihood of tokens *drawn
from the model's own predictions*. For those, E[g gᵀ] is the Fisher information at y, and to second order

    KL(model ‖ model with Ŵ)  ≈  ½ E[ (g · δx)² ]  ≈  ½ E[ Σ_o (g_o (δx)_o)² ]        nats a token

The last step leaves out the products of different outputs, which cancel on average: it is far less noisy on few tokens.
Padding has no loss and unrouted tokens never reach an expert, so both drop out by themselves. Estimates of linears add
up. (With E[g_o²] · (δ H δᵀ)_o, the mean of each factor alone, one gets nearly the same: docs/decisions.md.)

δ is the error that the run will really make: scales, ranges and codes are searched as the configuration says, in every
block as it was. Round-to-nearest's error would mislead: from one unit of the demo model the search takes nineteen parts
in twenty of the damage, from most less than half. With scales, Ŵ is what the block computes in the coordinates of the
original, diag(rows) · (codes' values) · diag(1/columns).

One block is in memory at a time, as in the engine:

    forward, block by block     the input of each is kept
    head                        the model's own code after the last block: L, and its gradient at that block's output
    backward, block by block    quantized, for δ; its forward again, with gradients for activations only; that of its
                                input goes on
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from awq_core.calibration.batches import CalibrationData
from awq_core.calibration.offload import Offloaded, load
from awq_core.calibration.stack import Kept, StackInputs, members_of
from awq_core.calibration.trace import finish
from awq_core.devices import release_freed_memory
from awq_core.errors import NumericsError, PlanError
from awq_core.mixed import Allocation, Target, choose, language_blocks
from awq_core.plan_types import BlockPlan
from awq_core.quantization.engine import Engine
from awq_core.quantization.fold import fold_rows, tied

TOKENS = 8192  # more change the order of units no further
_IGNORED = -100
# The time of a step, in forwards of a block: its forward again, its backward and δx; the search; the head.
_BACKWARD = 3
_SEARCH = 10
_HEAD = 6

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sensing:
    """Progress: what share of the work is done, and the seconds it took."""

    share: float
    seconds: float


def sensitivities(
    engine: Engine,
    stack: Sequence[BlockPlan],
    data: CalibrationData,
    *,
    seed: int = 0,
    tokens: int = TOKENS,
    progress: Callable[[Sensing], None] | None = None,
) -> dict[str, float]:
    """By name of each linear of the stack that the plan quantizes: the KL divergence that 4 bits in it are expected to
    bring, nats a token.

    Args:
        engine: whose model is empty; it is again afterwards.
        stack: all blocks of the stack that leads to the logits.
        data: of which as many batches are used as hold `tokens` tokens.
        seed: draws the tokens of the loss.

    Raises:
        PlanError: the model's blocks or head cannot be followed, or have no gradient.
        NumericsError: an estimate is NaN or inf; names the linear.
    """
    batches = _first(data, tokens)
    inputs = engine.trace(stack, batches)
    backward = _BACKWARD + (_SEARCH if engine.plan.config.needs_calibration else 0)
    started, steps, done = time.perf_counter(), (1 + backward) * len(stack) + _HEAD, 0

    def advance(cost: int) -> None:
        nonlocal done
        done += cost
        release_freed_memory()
        if progress:
            progress(Sensing(done / steps, time.perf_counter() - started))

    held: list[list[Kept]] = [inputs.hidden]
    for index, plan in enumerate(stack):
        held.append(_forward(engine, plan, inputs, index, held[-1]))
        advance(1)
    counted, gradients = _head(engine, stack, inputs, batches, held.pop(), seed)
    advance(_HEAD)
    found: dict[str, float] = {}
    for index, plan in reversed(list(enumerate(stack))):
        found |= _backward(engine, plan, inputs, index, held.pop(), gradients)
        advance(backward)
    for name, value in found.items():
        if not torch.isfinite(torch.tensor(value)):
            raise NumericsError(f"the sensitivity of {name} is not finite", hint="try --dtype bfloat16 or float32")
    return {name: 0.5 * value / max(counted, 1) for name, value in found.items()}


def allocation_for(
    engine: Engine,
    target: Target,
    data: CalibrationData,
    itemsize: int,
    progress: Callable[[Sensing], None] | None = None,
) -> Allocation:
    """Measure, then choose which units of the engine's plan stay as they are, for the target.

    Args:
        itemsize: bytes of one stored weight.

    Raises:
        ConfigError: nothing reaches the target.
        PlanError, NumericsError: see `sensitivities`.
    """
    stack = language_blocks(engine.plan)
    found = sensitivities(engine, stack, data, seed=engine.plan.config.seed, progress=progress)
    return choose(engine.plan, target, found, itemsize)


def _first(data: CalibrationData, tokens: int) -> list[Batch]:
    """Batches of at least so many tokens, those of plain text one window each: logits are large."""
    chosen: list[Batch] = []
    count = 0
    for batch in data.batches:
        plain = set(batch) == {"input_ids"}
        for part in ({"input_ids": row[None]} for row in batch["input_ids"]) if plain else (batch,):
            if count < tokens:
                chosen.append(part)
                count += part["input_ids"].numel()
    return chosen


def _forward(engine: Engine, plan: BlockPlan, inputs: StackInputs, index: int, hidden: list[Kept]) -> list[Kept]:
    """The inputs of the next block, or the outputs of the last."""
    block = engine.model.get_submodule(plan.path)
    result: list[Kept] = []
    with engine.source.filled(block, plan.path), torch.no_grad():
        for number, call in enumerate(inputs.calls[index]):
            out = call.returned(block, load(hidden[number]))
            inputs.members = members_of(out)
            out = inputs.following(number, index, out[0] if inputs.members else out)
            result.append(engine.offload.keep(out) if engine.offload else out)
    return result


def _head(
    engine: Engine,
    stack: Sequence[BlockPlan],
    inputs: StackInputs,
    batches: Sequence[Batch],
    last: list[Kept],
    seed: int,
) -> tuple[int, list[Kept]]:
    """(tokens that have a loss, the gradient of each batch's loss at the output of the last block)."""
    blocks = [engine.model.get_submodule(plan.path) for plan in stack]
    generator = torch.Generator().manual_seed(seed)
    counted, gradients = 0, list[Kept]()
    with engine.around([plan.path for plan in stack]):
        for number, batch in enumerate(batches):
            hidden = load(last[number]).detach().requires_grad_()
            with torch.enable_grad():
                logits = finish(engine.model, blocks, batch, hidden, members=inputs.members, device=engine.device)
                rows = logits.flatten(0, -2).float()
                drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
                mask = inputs.masks[number]
                if mask is not None:
                    drawn = drawn.masked_fill(~mask.to(drawn.device).flatten(), _IGNORED)
                loss = cross_entropy(rows, drawn, reduction="sum", ignore_index=_IGNORED)
            gradient = _gradient(loss, hidden, None, type(engine.model).__name__)
            gradients.append(engine.offload.keep(gradient) if engine.offload else gradient)
            counted += int((drawn != _IGNORED).sum())
    return counted, gradients


def _backward(
    engine: Engine, plan: BlockPlan, inputs: StackInputs, index: int, hidden: list[Kept], gradients: list[Kept]
) -> dict[str, float]:
    """Σ (g_o (δx)_o)² of each linear, over all tokens; `gradients` become those at the block's input."""
    block = engine.model.get_submodule(plan.path)
    inputs.hidden = hidden
    quantized = _quantized(engine, block, plan, inputs, index)
    with engine.source.filled(block, plan.path), _watched(block, plan, quantized) as sums:
        for number, call in enumerate(inputs.calls[index]):
            into = load(hidden[number]).detach().requires_grad_()
            with torch.enable_grad():
                out = call.run(block, into)
            kept = gradients[number]
            gradient = _gradient(out, into, load(kept), plan.path)
            if isinstance(kept, Offloaded):
                kept.store(gradient)
            else:
                gradients[number] = gradient
        return {name: float(value) for name, value in sums.items()}


def _quantized(
    engine: Engine, block: nn.Module, plan: BlockPlan, inputs: StackInputs, index: int
) -> dict[str, torch.Tensor]:
    """Ŵ of each linear, by its path in the block, `[out, in]` in the block's dtype and the original's coordinates."""
    if not plan.quantized:
        return {}
    with engine.source.filled(block, plan.path):
        calibrated = inputs if engine.plan.config.needs_calibration else None
        scales = engine.search(block, plan, calibrated, index).scales
        weights = {name: block.get_parameter(f"{name}.weight").data for name in _paths(plan)}
    for group in plan.groups:
        scale = scales.get(f"{plan.path}.{group.prev}")
        if scale is None:
            continue
        own, scale = tied(group, scale)
        for name in group.layers:
            weights[name] = (weights[name].float() / scale).to(weights[name].dtype)
        if group.prev in weights:
            rows = fold_rows(None, len(weights[group.prev]), own, sections=group.sections)
            weights[group.prev] = (weights[group.prev].float() * rows[:, None]).to(weights[group.prev].dtype)
    return weights


def _paths(plan: BlockPlan) -> dict[str, str]:
    """Path in the block -> name in the model, of each quantized linear."""
    return {plan.local(one): one.name for one in plan.quantized}


@contextmanager
def _watched(
    block: nn.Module, plan: BlockPlan, quantized: dict[str, torch.Tensor]
) -> Iterator[dict[str, torch.Tensor]]:
    """While it lasts, every backward pass of the block adds to the sums of its linears."""
    sums: dict[str, torch.Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Module, error: torch.Tensor) -> None:
        sums[name] = torch.zeros((), dtype=torch.float64, device=error.device)

        def forward(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            def backward(gradient: torch.Tensor) -> None:
                moved = linear(args[0].detach(), error)
                sums[name] += (moved.float() * gradient.float()).square().sum(dtype=torch.float64)

            if out.requires_grad:
                out.register_hook(backward)

        handles.append(module.register_forward_hook(forward))

    for path, name in _paths(plan).items():
        module = block.get_submodule(path)
        weight = block.get_parameter(f"{path}.weight").data
        watch(name, module, (quantized.pop(path).float() - weight.float()).to(weight.dtype))
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _gradient(out: torch.Tensor, into: torch.Tensor, gradient: torch.Tensor | None, where: str) -> torch.Tensor:
    try:
        out.backward(gradient)
    except RuntimeError as error:
        if "grad" not in str(error) and "derivative" not in str(error):
            raise  # out of memory, say
        line = " ".join(str(error).split())[:160]
        raise PlanError(f"{where} has no gradient: {line}", hint="choose by hand: --keep NAME") from error
    if into.grad is None:
        raise PlanError(f"{where} does not use its input", hint="choose by hand: --keep NAME")
    return into.grad
