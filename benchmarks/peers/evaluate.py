"""Perplexity of every result and its KL divergence from the original, by one piece of code and in fp32.

Each result is read from its files, turned into plain weights, and run in transformers' own model: what is measured is
what was written, not what a toolkit has in memory.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peers.layouts import Tensors, plain_weights


def put_weights(model: Any, weights: Tensors) -> None:
    """Every weight of the model, none left over."""
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    outcome = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = set(outcome.missing_keys) - (tied if model.config.tie_word_embeddings else set())
    if missing or outcome.unexpected_keys:
        raise ValueError(f"missing {sorted(missing)[:3]}, unexpected {outcome.unexpected_keys[:3]}")


def log_probabilities(model: Any, windows: list[list[int]]) -> Iterator[torch.Tensor]:
    """Per window, [tokens, vocabulary]."""
    for ids in windows:
        yield model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def measure(model: Any, windows: list[list[int]], reference: Path, *, original: bool = False) -> dict[str, float]:
    """Perplexity; with the reference's log-probabilities from its folder, divergence and agreement too.

    Args:
        original: this is the reference, so write them.
    """
    nll = kl = agreement = 0.0
    for number, (ids, log_q) in enumerate(zip(windows, log_probabilities(model, windows), strict=True)):
        targets = torch.tensor(ids[1:])
        nll -= float(log_q[:-1].gather(1, targets[:, None]).mean()) / len(windows)
        file = reference / f"{number}.pt"
        if original:
            torch.save(log_q, file)
            continue
        log_p = torch.load(file, weights_only=True)
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) / len(windows)
        agreement += float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()) / len(windows)
    return {"perplexity": math.exp(nll)} | ({} if original else {"kl": kl, "agreement": agreement})


@torch.no_grad()
def main() -> None:
    """Reads {"source", "tokens", "threads", "results": {name: folder}}; prints {name: measures} as JSON."""
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(wanted["threads"])
    logging.disable_progress_bar()
    windows = json.loads(Path(wanted["tokens"]).read_text(encoding="utf-8"))["held_out"]
    model = AutoModelForCausalLM.from_pretrained(wanted["source"], dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory(dir=Path(sys.argv[1]).parent) as folder:
        found: dict[str, Any] = {"original": measure(model, windows, Path(folder), original=True)}
        for name, result in wanted["results"].items():
            try:
                put_weights(model, plain_weights(Path(result)))
                found[name] = measure(model, windows, Path(folder))
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
