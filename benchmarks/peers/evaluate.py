"""Perplexity of every result and its KL divergence from the original, by one piece of code and in fp32.

Each result is read from its files, turned into plain weights, and run in transformers' own model: what is measured is
what was written, not what a toolkit has in memory.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from peers.layouts import Tensors, plain_weights

Measured = dict[str, list[float]]


def stacked_experts(weights: Tensors, wanted: Collection[str]) -> Tensors:
    """Experts that a toolkit wrote by the names they have in memory, stacked as they are there.

    "B.M.experts.0.gate_proj.weight" [inner, in], "B.M.experts.0.up_proj.weight", .. become "B.mlp.experts.gate_up_proj"
    [experts, 2 inner, in], and "B.M.experts.0.down_proj.weight", .. "B.mlp.experts.down_proj" [experts, in, inner].
    M may be another word than the model's own "mlp": llm-compressor writes Mixtral's "block_sparse_moe" there.
    """
    weights = dict(weights)
    for name in wanted:
        path, _, kind = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
        block = path.removesuffix(".experts").rpartition(".")[0]
        if parts is None or not path.endswith(".experts"):
            continue
        first = re.compile(rf"{re.escape(block)}\.\w+\.experts\.0\.{parts[0]}\.weight")
        for found in [one for one in weights if first.fullmatch(one)]:
            there = found.removesuffix(f".0.{parts[0]}.weight")
            experts = []
            while f"{there}.{len(experts)}.{parts[0]}.weight" in weights:
                number = len(experts)
                experts.append(torch.cat([weights.pop(f"{there}.{number}.{part}.weight") for part in parts]))
            weights[name] = torch.stack(experts)
    return weights


def with_weights(model: Any, weights: Tensors) -> Any:
    """A model like `model` with these weights: every one of its own, none left over.

    transformers' own loader puts them in, since names in files differ from names in memory: a file's experts are
    linears of their own, a model of transformers 5 holds them stacked.

    Raises:
        ValueError: a weight is missing, or has no place.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    weights = stacked_experts(weights, model.state_dict().keys())
    made, outcome = type(model).from_pretrained(
        None, config=model.config, state_dict=weights, dtype=torch.float32, output_loading_info=True
    )
    missing, unexpected = sorted(outcome["missing_keys"]), sorted(outcome["unexpected_keys"])
    if missing or unexpected:
        raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    return made.eval()


def log_probabilities(model: Any, windows: list[list[int]]) -> Iterator[torch.Tensor]:
    """Per window, [tokens, vocabulary]."""
    for ids in windows:
        yield model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def measure(model: Any, windows: list[list[int]], reference: Path, *, original: bool = False) -> Measured:
    """Window by window, mean over its tokens: "nll", nats; but for the original also "kl" and "agreement" with it.

    Args:
        reference: folder of the original's log-probabilities.
        original: this is the original, so write them.

    Raises:
        ValueError: a number is not finite.
    """
    found: Measured = {"nll": []} if original else {"nll": [], "kl": [], "agreement": []}
    for number, (ids, log_q) in enumerate(zip(windows, log_probabilities(model, windows), strict=True)):
        targets = torch.tensor(ids[1:])
        found["nll"].append(-float(log_q[:-1].gather(1, targets[:, None]).mean()))
        file = reference / f"{number}.pt"
        if original:
            reference.mkdir(parents=True, exist_ok=True)
            torch.save(log_q, file)
            continue
        log_p = torch.load(file, weights_only=True)
        found["kl"].append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        found["agreement"].append(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
    if not all(math.isfinite(value) for values in found.values() for value in values):
        raise ValueError("a loss or a divergence is not finite")
    return found


@torch.no_grad()
def main() -> None:
    """Reads {"source", "tokens", "reference", "threads", "results": {name: folder}}; prints as JSON

        {name: {text: {"nll": [a number a window], "kl": [..], "agreement": [..]}}, or {"failed": why}}

    with "original" among the names where the folder "reference" is not there yet: then it is made.
    """
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(wanted["threads"])
    logging.disable_progress_bar()
    texts: dict[str, list[list[int]]] = json.loads(Path(wanted["tokens"]).read_text(encoding="utf-8"))["texts"]
    reference = Path(wanted["reference"])
    model = AutoModelForCausalLM.from_pretrained(wanted["source"], dtype=torch.float32).eval()
    found: dict[str, Any] = {}
    if not reference.is_dir():
        found["original"] = {
            text: measure(model, windows, reference / text, original=True) for text, windows in texts.items()
        }
    for name, result in wanted["results"].items():
        try:
            quantized = with_weights(model, plain_weights(Path(result)))
            found[name] = {text: measure(quantized, windows, reference / text) for text, windows in texts.items()}
        except Exception as error:  # files of others: whatever is wrong with one is that one's row
            found[name] = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
