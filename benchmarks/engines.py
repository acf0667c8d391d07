"""A checkpoint of this project in transformers itself, with gptqmodel, against `awq_core.load`: the same logits?

    python benchmarks/engines.py                  the example model, quantized here
    python benchmarks/engines.py MODEL            another one
    python benchmarks/engines.py DIR --json       an AWQ folder as it is

transformers and gptqmodel run in an environment that the script makes once in --env-folder (a minute, a gigabyte).
This project is not installed there: `AutoModelForCausalLM.from_pretrained` reads the folder by itself, on the CPU, in
float32. "auto" is the kernel that it chooses, whose products are bfloat16; "torch_awq" is plain torch, whose products
are float16.

  largest    max|theirs - ours| / max|ours|, over the logits of all tokens
  rms        |theirs - ours| / |ours|, lengths of the vectors of all those logits

The exit code is 1 where `largest` is above 1e-2, or a number is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peers.environments import interpreter
from peers.running import child_environment, markdown, module_command, say

HERE = Path(__file__).resolve().parent
LIMIT = 1e-2
SEQUENCES = 2


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """The two measures above, of logits [sequences, tokens, vocabulary].

    Raises:
        ValueError: their shapes differ.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"logits {list(theirs.shape)}, ours {list(ours.shape)}")
    ours, apart = ours.double(), (theirs.double() - ours.double())
    return {"largest": float(apart.abs().max() / ours.abs().max()), "rms": float(apart.norm() / ours.norm())}


def same(found: dict[str, float]) -> bool:
    """Within the limit; what is not a number is not."""
    return all(map(math.isfinite, found.values())) and found["largest"] <= LIMIT


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

    question, out = work / "logits.json", work / "logits.safetensors"
    wanted = {"model": str(folder.resolve()), "ids": ids, "backends": backends, "out": str(out), "threads": threads}
    question.write_text(json.dumps(wanted), encoding="utf-8")
    command, environment = module_command(str(python), "logits", question), child_environment(threads)
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=work)
    return load_file(out), json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=HERE.parent / "examples" / "pycoder")
    parser.add_argument(
        "--samples", type=int, default=8, help="calibration windows, if it is quantized here (default: 8)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="in each of two sequences (default: 64)")
    parser.add_argument("--backends", nargs="+", default=["auto", "torch_awq"], help="of transformers' AwqConfig")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--env-folder", type=Path, default=HERE.parent / ".cache" / "peers", metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        python = interpreter("gptqmodel", options.env_folder, say)
        folder = quantized(options.model, work, options.samples)
        ids, ours = our_logits(folder, options.tokens)
        theirs, told = their_logits(python, folder, ids, options.backends, work, options.threads)
    rows: list[dict[str, Any]] = []
    for backend in options.backends:
        linears = told["linears"][backend]
        if not linears:
            raise SystemExit(f"{backend}: no linear is quantized there")
        found = difference(ours, theirs[backend])
        rows.append({"backend": backend, "linears": linears, **found, "same": same(found)})
    if options.json:
        versions = told["versions"]
        print(json.dumps({"model": str(options.model), "limit": LIMIT, "versions": versions, "rows": rows}, indent=2))
    else:
        lines = [["backend", "linears", "largest", "rms", f"within {LIMIT:g}"]]
        for row in rows:
            kinds = ", ".join(f"{count} {kind}" for kind, count in row["linears"].items())
            lines.append([row["backend"], kinds, f"{row['largest']:.1e}", f"{row['rms']:.1e}", str(row["same"])])
        print(markdown(lines))
        print(", ".join(f"{package} {version}" for package, version in told["versions"].items()))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.path.remove(str(HERE))  # transformers, imported later, would take kernels.py for the package of that name
    sys.exit(main())
