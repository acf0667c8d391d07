"""A checkpoint of this project in transformers with gptqmodel, or in vLLM, against `awq_core.load`: the same numbers?

    python benchmarks/engines.py                        the example model, quantized here, in transformers
    python benchmarks/engines.py MODEL --engine vllm    another one, in vLLM
    python benchmarks/engines.py DIR --json             an AWQ folder as it is

The engine runs in an environment that the script makes once in --env-folder (a minute, a gigabyte; vLLM: five minutes,
four gigabytes). This project is not installed there: the engine reads the folder by itself, on the CPU.

transformers computes in float32. "auto" is the kernel that it chooses, whose products are bfloat16; "torch_awq" is
plain torch, whose products are float16. vLLM's rows are explained in peers/vllm_rows.py.

  largest    max|theirs - ours| / max|ours|, over the logits of all tokens
  rms        |theirs - ours| / |ours|, lengths of the vectors of all those logits

The exit code is 1 where `largest` is above the row's limit, 1e-2 in transformers, or a number is not finite.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers import vllm_rows
from peers.distance import LIMIT, difference, same
from peers.environments import interpreter
from peers.running import ask, markdown, say

HERE = Path(__file__).resolve().parent
SEQUENCES = 2
ENVIRONMENTS = {"transformers": "gptqmodel", "vllm": "vllm"}
BACKENDS = {"transformers": ("auto", "torch_awq"), "vllm": vllm_rows.BACKENDS}


def quantized(model: Path, work: Path, samples: int) -> Path:
    """`model` where it is quantized already, else a folder in `work`."""
    import awq_core

    if "quantization_config" in json.loads((model / "config.json").read_text(encoding="utf-8")):
        return model
    say(f"quantizing {model}")
    awq_core.quantize(model, work / "awq", samples=samples, seq_len=256, device="cpu")
    return work / "awq"


@torch.no_grad()
def our_logits(folder: Path, tokens: int) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids [sequences, tokens], drawn with a fixed seed, and our logits for them."""
    import awq_core

    model = awq_core.load(folder, dtype="float32")
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (SEQUENCES, tokens), generator=torch.Generator().manual_seed(0))
    return ids.tolist(), model(input_ids=ids, use_cache=False).logits.float()


def their_logits(
    python: Path, folder: Path, ids: list[list[int]], backends: list[str], work: Path, threads: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Logits of each backend, and what the process prints (peers/logits.py): its versions, and which linears it had.

    Raises:
        subprocess.CalledProcessError: the process failed; its words are on stderr.
    """
    from safetensors.torch import load_file

    out = work / "logits.safetensors"
    wanted = {"model": str(folder.resolve()), "ids": ids, "backends": backends, "out": str(out), "threads": threads}
    told = ask("logits", wanted, work, threads, python)
    return load_file(out), told


def transformers_rows(
    python: Path, folder: Path, tokens: int, backends: list[str], work: Path, threads: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each backend, and the versions of what ran."""
    ids, ours = our_logits(folder, tokens)
    theirs, told = their_logits(python, folder, ids, backends, work, threads)
    rows: list[dict[str, Any]] = []
    for backend in backends:
        linears = told["linears"][backend]
        if not linears:
            raise SystemExit(f"{backend}: no linear is quantized there")
        found = difference(ours, theirs[backend])
        what = ", ".join(f"{count} {kind}" for kind, count in linears.items())
        rows.append({"backend": backend, "limit": LIMIT, "what": what, **found, "same": same(found)})
    return rows, told["versions"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=HERE.parent / "examples" / "pycoder")
    parser.add_argument(
        "--samples", type=int, default=8, help="calibration windows, if it is quantized here (default: 8)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="in each of two sequences (default: 64)")
    parser.add_argument("--engine", choices=list(BACKENDS), default="transformers")
    parser.add_argument(
        "--backends", nargs="+", help="of transformers' AwqConfig; of vLLM: weights float16 bfloat16 (default: all)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--env-folder", type=Path, default=HERE.parent / ".cache" / "peers", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        backends = options.backends or list(BACKENDS[options.engine])
        python = interpreter(ENVIRONMENTS[options.engine], options.env_folder, say)
        folder = quantized(options.model, work, options.samples)
        if options.engine == "vllm":
            rows, versions = vllm_rows.rows(python, folder, options.tokens, SEQUENCES, backends, work, options.threads)
        else:
            rows, versions = transformers_rows(python, folder, options.tokens, backends, work, options.threads)
    if options.json:
        print(json.dumps({"model": str(options.model), "engine": options.engine, "versions": versions, "rows": rows}))
    else:
        lines = [["backend", "what", "largest", "rms", "limit", "within"]]
        for row in rows:
            numbers = [f"{row[name]:.1e}" for name in ("largest", "rms")]
            lines.append([row["backend"], row["what"], *numbers, f"{row['limit']:g}", str(row["same"])])
        print(markdown(lines))
        print(", ".join(f"{package} {version}" for package, version in versions.items()))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.path.remove(str(HERE))  # transformers, imported later, would take kernels.py for the package of that name
    sys.exit(main())
