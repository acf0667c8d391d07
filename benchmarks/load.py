"""Loading a 4-bit model of Llama-2-7B's shapes: memory at its worst, and time against reading the same files.

    python benchmarks/load.py --layers 4
    python benchmarks/load.py --layers 32 --folder llama-7b --json    (made once, kept, 3.9 GB)

The folder is made of random codes. A fresh process loads it and looks at its own resident memory, which the kernel
counts (VmHWM), less what the imports had taken. The bound is 1.2 times the files and 1 GB. `plain read` is the time to
read the files into one small buffer just before; both find them in the page cache where they fit, so what is compared
is the work, not the disk. On a busy machine look at the CPU time. `--drop` asks the kernel to forget the files first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

GROUP = 128
HIDDEN, MIDDLE, VOCABULARY = 4096, 11008, 32000
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (HIDDEN, MIDDLE),
    "mlp.up_proj": (HIDDEN, MIDDLE),
    "mlp.down_proj": (MIDDLE, HIDDEN),
}  # [in, out]
ALLOWED_FACTOR, ALLOWED_MORE = 1.2, 1e9


def make(folder: Path, layers: int) -> None:
    """A checkpoint with one shard a layer and one for the rest."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from awq_core.checkpoint.format import quantization_config

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def words(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns // 8), generator=generator, dtype=torch.int32)

    place = {}
    for number in range(layers):
        tensors = {}
        for name, (inputs, outputs) in LINEARS.items():
            base = f"model.layers.{number}.{name}"
            tensors[f"{base}.qweight"] = words(inputs, outputs)
            tensors[f"{base}.qzeros"] = words(inputs // GROUP, outputs)
            tensors[f"{base}.scales"] = torch.full((inputs // GROUP, outputs), 0.01, dtype=torch.float16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{number}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
        shard = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, shard)
    rest = {
        "model.embed_tokens.weight": torch.full((VOCABULARY, HIDDEN), 0.01, dtype=torch.float16),
        "lm_head.weight": torch.full((VOCABULARY, HIDDEN), 0.01, dtype=torch.float16),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.float16),
    }
    save_file(rest, folder / "model-rest.safetensors", metadata={"format": "pt"})
    place |= dict.fromkeys(rest, "model-rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=MIDDLE, num_hidden_layers=layers, num_attention_heads=32,
        vocab_size=VOCABULARY, dtype="float16", architectures=["LlamaForCausalLM"],
        quantization_config=quantization_config(group_size=GROUP, modules_to_not_convert=["lm_head"]),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def child(folder: str, dtype: str) -> None:
    """Load and print what it took; in a process of its own, where nothing else was ever resident."""
    from awq_core.devices import peak_bytes, reset_peak, resident_bytes
    from awq_core.hooks.manager import default_manager
    from awq_core.runtime.linear import QuantLinear
    from awq_core.runtime.load import load

    default_manager()
    here = torch.device("cpu")
    reset_peak(here)
    start = resident_bytes()
    begin, busy = time.perf_counter(), time.process_time()
    model = load(folder, dtype=dtype)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    kernels = sorted({module.backend for module in model.modules() if isinstance(module, QuantLinear)})
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    found = {"seconds": seconds, "cpu_seconds": busy, "peak": peak_bytes(here) - start, "end": resident_bytes() - start}
    print(json.dumps({**found, "held": held, "kernels": kernels}))


def read(files: list[Path]) -> float:
    """Seconds to read the files, 16 MiB at a time."""
    buffer = bytearray(1 << 24)
    begin = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begin


def drop(files: list[Path]) -> None:
    """Ask the kernel to forget the pages of the files."""
    for path in files:
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def measure(folder: Path, dtype: str, dropping: bool) -> dict:
    files = sorted(folder.glob("*.safetensors"))
    packed = sum(path.stat().st_size for path in files)
    if dropping:
        drop(files)
    else:
        read(files)
    plain = read(files)
    if dropping:
        drop(files)
    command = [sys.executable, __file__, "--child", str(folder), "--dtype", dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    allowed = ALLOWED_FACTOR * packed + ALLOWED_MORE
    return {"dtype": dtype, "packed": packed, "read_seconds": plain, **found, "allowed": allowed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, 104 MB each (default 4; the 7B has 32)")
    parser.add_argument("--folder", type=Path, help="make it here and keep it; what is there is loaded as it is")
    parser.add_argument("--dtype", default="bfloat16", help="of activations (default bfloat16)")
    parser.add_argument("--drop", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child, options.dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            make(folder, options.layers)
        found = measure(folder, options.dtype, options.drop)
    if options.json:
        print(json.dumps(found, indent=2))
        return None
    print(f"files        {found['packed'] / 1e9:6.2f} GB, kernel {', '.join(found['kernels'])}, {found['dtype']}")
    print(f"model        {found['held'] / 1e9:6.2f} GB of tensors, {found['end'] / 1e9:.2f} GB resident at the end")
    print(f"peak         {found['peak'] / 1e9:6.2f} GB of {found['allowed'] / 1e9:.2f} GB allowed")
    print(f"load         {found['seconds']:6.2f} s, {found['cpu_seconds']:.2f} s of it on a CPU")
    print(f"plain read   {found['read_seconds']:6.2f} s")
    return None


if __name__ == "__main__":
    main()
