"""One timed run: a prompt, and the tokens that the model writes after it.

It writes greedily, one token at a time through its own cache, and no end token stops it. Where the model wants a cache
of fixed size, `generate` does this: it alone compiles the step that such a cache is for, and captures it as a graph.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from awq_core.devices import peak_bytes, release_freed_memory, reset_peak
from awq_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Run:
    """One prompt and its continuation.

    Attributes:
        tokens: new ones, int64 [batch, new].
        first: seconds until the first of them was known.
        steps: seconds of each step after it; new - 1 of them.
        memory: the most bytes in use meanwhile.
    """

    tokens: torch.Tensor
    first: float
    steps: tuple[float, ...]
    memory: int


def timed_run(model: Any, prompt: torch.Tensor, new_tokens: int) -> Run:
    """Continue `prompt`, int64 [batch, context], greedily by `new_tokens` tokens.

    Raises:
        ConfigError: the model returns no cache.
    """
    device = torch.device(model.device)
    prompt = prompt.to(device)
    release_freed_memory()
    reset_peak(device)
    fixed = getattr(model.generation_config, "cache_implementation", None)
    with torch.no_grad():
        tokens, times = (_generate if fixed else _step_by_step)(model, prompt, new_tokens)
    spans = [later - earlier for earlier, later in pairwise(times)]
    return Run(tokens.cpu(), spans[0], tuple(spans[1:]), peak_bytes(device))


def random_prompt(ids: torch.Tensor, batch: int, context: int, *, seed: int = 0) -> torch.Tensor:
    """Tokens drawn evenly from `ids`: int64 [batch, context]."""
    generator = torch.Generator().manual_seed(seed)
    return ids[torch.randint(len(ids), (batch, context), generator=generator)]


def _step_by_step(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, list[float]]:
    """New tokens [batch, new], and the times before the first of them and after each."""
    # Of a prompt only the last position's logits are wanted, and all of them can be gigabytes.
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    tokens, times = [], [_now(prompt.device)]
    given, cache = prompt, None
    for _ in range(new_tokens):
        out = model(input_ids=given, past_key_values=cache, use_cache=True, **last)
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise ConfigError(f"{type(model).__name__} returns no cache", hint="only models that cache are measured")
        given = out.logits[:, -1:].argmax(-1)
        tokens.append(given)
        times.append(_now(prompt.device))
    return torch.cat(tokens, 1), times


class _Times:
    """A streamer of `generate`, which gives it the prompt at first and then each step's tokens."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(_now(self.device))

    def end(self) -> None:
        """Nothing is left to be said."""


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, list[float]]:
    """The same by `generate`, greedy whatever the model's own sampling settings are."""
    streamer = _Times(prompt.device)
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        streamer=streamer,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
    )
    return made[:, prompt.shape[1] :], streamer.times


def _now(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
