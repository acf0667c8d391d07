"""vLLM's rows of benchmarks/engines.py: its weights, its log-probabilities, and the tokens it chooses, beside ours.

weights              every tensor of the folder as vLLM's loader read it, against this folder's own decoder: exactly
float16, bfloat16    log-probabilities that the engine gives for the prompts in that dtype, against ours in float32
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peers.distance import LIMIT, difference, same
from peers.layouts import plain_weights, read_tensors
from peers.running import ask

NEW = 32  # tokens that each sequence is continued by
LIMITS = {"weights": 0.0, "float16": LIMIT, "bfloat16": 5 * LIMIT}  # bfloat16 rounds to 8 bits, float16 to 11
BACKENDS = tuple(LIMITS)


def weights_row(expected: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every tensor of `expected`, float32 by name, must be there, bit for bit.

    Raises:
        ValueError: one is missing or has another shape.
    """
    for name, tensor in expected.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise ValueError(f"vLLM has {name} as {list(theirs[name].shape) if name in theirs else 'nothing'}")
    ours, read = (torch.cat([one[name].flatten() for name in expected]) for one in (expected, theirs))
    found = difference(ours, read)
    equal = sum(torch.equal(expected[name], theirs[name]) for name in expected)
    same_names = same(found, LIMITS["weights"]) and equal == len(expected)
    return {"what": f"{equal} of {len(expected)} tensors", **found, "same": same_names}


def logits_row(dtype: str, ours: torch.Tensor, tokens: int, theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Compare "logprobs" and "tokens" (peers/vllm_logits.py) with our logits of prompts of `tokens` tokens, continued
    as vLLM continued them.

    "behind" is how far, at most, the token it chose is behind our best one, in parts of our largest logit.
    """
    found = difference(ours.log_softmax(-1)[:, : tokens - 1], theirs["logprobs"])
    after = ours[:, tokens - 1 : -1]
    behind = after.amax(-1) - after.gather(-1, theirs["tokens"][..., None])[..., 0]
    worst = float(behind.max() / ours.abs().max())
    agreed = f"{int((behind == 0).sum())} of {behind.numel()} tokens"
    good = same(found, LIMITS[dtype]) and worst <= LIMITS[dtype]
    return {"what": agreed, **found, "behind": worst, "same": good}


def expected_weights(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The folder's tensors in float32, and the dtype of its steps: vLLM casts what is not quantized to that."""
    stored = read_tensors(folder)
    dtype = next(tensor.dtype for name, tensor in stored.items() if name.endswith(".scales"))
    plain = plain_weights(folder)
    cast = {name: tensor.to(dtype).float() if name in stored else tensor for name, tensor in plain.items()}
    return cast, str(dtype).removeprefix("torch.")


@torch.no_grad()
def rows(
    python: Path, folder: Path, tokens: int, sequences: int, backends: list[str], work: Path, threads: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each backend, and the versions of what ran.

    Raises:
        subprocess.CalledProcessError: vLLM failed; its words are on stderr.
    """
    import awq_core

    found: list[dict[str, Any]] = []
    told: dict[str, Any] = {}
    model = awq_core.load(folder, dtype="float32") if set(backends) - {"weights"} else None
    for backend in backends:
        out = work / f"{backend}.safetensors"
        wanted: dict[str, Any] = {"model": str(folder.resolve()), "out": str(out), "threads": threads}
        if model is None or backend == "weights":
            expected, dtype = expected_weights(folder)
            told = ask("vllm_weights", wanted | {"dtype": dtype}, work, threads, python)
            row = {"kernel": told["method"], **weights_row(expected, load_file(out))}
        else:
            vocabulary = model.config.get_text_config().vocab_size
            ids = torch.randint(vocabulary, (sequences, tokens), generator=torch.Generator().manual_seed(0))
            wanted |= {"dtype": backend, "ids": ids.tolist(), "new": NEW}
            told = ask("vllm_logits", wanted, work, threads, python)
            theirs = load_file(out)
            logits = model(input_ids=torch.cat([ids, theirs["tokens"]], 1), use_cache=False).logits.float()
            row = {"kernel": told["kernel"], **logits_row(backend, logits, tokens, theirs)}
        found.append({"backend": backend, "limit": LIMITS[backend], **row})
    return found, told["versions"]
