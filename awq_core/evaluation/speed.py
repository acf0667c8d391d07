"""How fast a model is: time to first token, prefill and decode rates, peak memory; several models in turn.

One run reads a prompt of random tokens, `[batch, context]`, and then writes n tokens (`timing.py`). With t₁ the time
until the first of them is known and d the time of the n - 1 steps after it,

    time to first token = t₁     prefill = batch · context / t₁     decode = batch · (n - 1) / d     tokens a second

A machine is never quite free. So several models run alternately, first one in front, then the other, and how many times
as fast one is comes from each round by itself, time over time, before the median of the rounds is taken: what slows a
round slows both. Models run once at every shape before anything counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from awq_core.errors import ConfigError
from awq_core.evaluation.timing import Run, random_prompt, timed_run

# (runs done, runs in all, seconds left or None where not every shape has run yet)
Progress = Callable[[int, int, float | None], None]


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the rounds.

    Attributes:
        first_token_seconds: from the prompt to the first new token.
        prefill_tokens_per_second, decode_tokens_per_second: over the whole batch.
        memory_bytes: peak of the process (on CUDA: of what torch allocated there) without the other models' weights.
    """

    first_token_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast the first model is as the second; `memory` is its share of the second's memory."""

    prefill: float
    decode: float
    memory: float


@dataclass(frozen=True, slots=True)
class Point:
    """One batch size and context length: a `Speed` for each model, and a `Ratio` where there are two."""

    batch: int
    context: int
    speeds: tuple[Speed, ...]
    ratio: Ratio | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_speed(
    models: Sequence[Any],
    *,
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (128,),
    new_tokens: int = 64,
    rounds: int = 3,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Point, ...]:
    """Run every model at every batch size and context length, `rounds` times each, in turn.

    Args:
        models: one or two of transformers' models, of one vocabulary.
        new_tokens: made in a run; at least 2.
        seed: of the prompts' tokens.

    Raises:
        ConfigError: the model holds fewer positions than context and new tokens, returns no cache, or the two models
            have different vocabularies.
    """
    ids = _vocabulary(models)
    for model in models:
        _refuse_too_long(model, max(contexts) + new_tokens)
    shapes = [(batch, context) for batch in batches for context in contexts]
    prompts = {shape: random_prompt(ids, *shape, seed=seed) for shape in shapes}
    others = [sum(weight_bytes(other) for other in models if other is not model) for model in models]
    warm: dict[tuple[int, int], list[float]] = {}
    done, total = 0, len(shapes) * len(models) * (rounds + 1)

    def one(model: Any, shape: tuple[int, int]) -> Run:
        nonlocal done
        run = timed_run(model, prompts[shape], new_tokens)
        done += 1
        return run

    def report(left: float | None) -> None:
        if progress is not None:
            progress(done, total, left)

    for shape in shapes:
        for model in models:
            run = one(model, shape)
            warm.setdefault(shape, []).append(run.first + sum(run.steps))
            report(None)
    left = rounds * sum(map(sum, warm.values()))
    points = []
    for shape in shapes:
        runs: list[list[Run]] = [[] for _ in models]
        for turn in range(rounds):
            for index in _order(len(models), turn):
                runs[index].append(one(models[index], shape))
                left -= warm[shape][index]
                report(left)
        points.append(_point(shape, runs, others))
    return tuple(points)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; those that share memory count once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({(one.data_ptr(), one.nbytes): one.nbytes for one in tensors}.values())


def _vocabulary(models: Sequence[Any]) -> torch.Tensor:
    """Ids of ordinary tokens: a placeholder for an image would want the image."""
    sizes = {int(model.config.get_text_config().vocab_size) for model in models}
    if len(sizes) > 1:
        raise ConfigError(
            f"vocabularies of {' and '.join(map(str, sorted(sizes)))} tokens", hint="give the model it was made of"
        )
    ids = torch.arange(sizes.pop())
    for model in models:
        special = set(_special_ids(model.config))
        ids = torch.tensor([token for token in ids.tolist() if token not in special])
    return ids


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, (list, tuple)) else [value]


def _refuse_too_long(model: Any, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and length > most:
        raise ConfigError(
            f"context and new tokens are {length}, the model holds {most}", hint="a shorter --context or less --new"
        )


def _order(count: int, turn: int) -> Iterator[int]:
    """Whoever runs first differs from round to round."""
    return ((index + turn) % count for index in range(count))


def _point(shape: tuple[int, int], runs: list[list[Run]], others: Sequence[int]) -> Point:
    batch, context = shape
    speeds = tuple(
        Speed(
            first_token_seconds=median(run.first for run in mine),
            prefill_tokens_per_second=median(batch * context / run.first for run in mine),
            decode_tokens_per_second=median(batch * len(run.steps) / sum(run.steps) for run in mine),
            memory_bytes=max(run.memory for run in mine) - held,
        )
        for mine, held in zip(runs, others, strict=True)
    )
    if len(runs) != 2:
        return Point(batch, context, speeds, None)
    pairs = list(zip(*runs, strict=True))
    ratio = Ratio(
        prefill=median(theirs.first / mine.first for mine, theirs in pairs),
        decode=median(sum(theirs.steps) / sum(mine.steps) for mine, theirs in pairs),
        memory=speeds[0].memory_bytes / speeds[1].memory_bytes,
    )
    return Point(batch, context, speeds, ratio)
