"""What the demo measures of one model: perplexity, distance from the original, speed, size, and what it writes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from awq_core.cli.output import weight_bytes
from awq_core.evaluation import divergence, perplexity

WINDOW = 512
RUNS = 3
PROMPT = "def read_json(path):"


@dataclass(frozen=True)
class Row:
    """One model's line in the table. The divergence of the original from itself is None."""

    name: str
    folder: Path
    perplexity: float
    kl_mean: float | None
    kl_stderr: float | None
    top1_agreement: float | None
    bytes: int
    tokens_per_second: float
    completion: str


class Remembering(nn.Module):
    """A model that keeps the logits of every window it has seen, so that two measures cost one pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.seen: dict[bytes, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """The model's own output, the second time from memory."""
        key = input_ids.cpu().numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids, **kwargs)
        return self.seen[key]


def measure(
    name: str,
    folder: Path,
    model: Remembering,
    reference: Remembering | None,
    tokenizer: Any,
    text: str,
    *,
    windows: int,
    new_tokens: int,
) -> Row:
    """One row: `model` alone, or compared with `reference`."""
    fit = perplexity(model, tokenizer, text, window=WINDOW, max_windows=windows)
    apart = None
    if reference is not None:
        apart = divergence(reference, model, tokenizer, text, window=WINDOW, max_windows=windows)
        model.seen.clear()
    speed, completion = complete(model.model, tokenizer, new_tokens)
    return Row(
        name,
        folder,
        fit.perplexity,
        apart.kl_mean if apart else None,
        apart.kl_stderr if apart else None,
        apart.top1_agreement if apart else None,
        weight_bytes(folder),
        speed,
        completion,
    )


def complete(model: Any, tokenizer: Any, new_tokens: int) -> tuple[float, str]:
    """(tokens per second of greedy decoding, the best of three runs, and what the model makes of `PROMPT`)."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    end = tokenizer.eos_token_id
    settings = {"do_sample": False, "pad_token_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id}
    with torch.no_grad():
        best = float("inf")
        for _ in range(RUNS):
            started = time.perf_counter()
            ids = model.generate(**inputs, **settings, max_new_tokens=new_tokens, min_new_tokens=new_tokens)[0]
            best = min(best, time.perf_counter() - started)
    return new_tokens / best, tokenizer.decode(ids, skip_special_tokens=True)
