"""Peak memory and time against depth: the estimate of `awq plan` beside what the process really used.

    python benchmarks/scale.py                      depths 4, 8, 16, 32 of a small shape
    python benchmarks/scale.py --shape 7b --depths 32 --samples 4
    python benchmarks/scale.py --shape 70b --plan-only

Writes a checkpoint of random bf16 weights in the shape asked for (13.5 GB for 7b at depth 32; deleted afterwards),
quantizes it in a process of its own and reads that process's peak resident memory from the operating system.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from awq_core import plan
from awq_core.testing.tiny import tiny_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
}
DEPTH = {"small": 8, "7b": 32, "70b": 80}


def config_of(shape: str, depth: int) -> LlamaConfig:
    return LlamaConfig(
        **SHAPES[shape],
        num_hidden_layers=depth,
        vocab_size=32000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
        bos_token_id=None,
        eos_token_id=None,
    )


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Random weights, one shard a layer, never more than a layer in memory."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    index: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        tensors = {f"{p}{name}.weight": random(*shape) for name, shape in shapes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"{p}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        shard(f"layer-{layer:03d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": random(32000, hidden), "lm_head.weight": random(32000, hidden)}
    shard("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def quantize(source: Path, out: Path, samples: int, seq_len: int) -> tuple[float, int]:
    """(seconds, peak resident bytes) of `awq quantize` in its own process."""
    command = [sys.executable, "-c", CHILD, str(source), str(out), str(samples), str(seq_len)]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, int(done.stdout.strip().splitlines()[-1])


CHILD = """
import resource, sys
from awq_core.cli import main
source, out, samples, seq_len = sys.argv[1:]
sys.argv = ["awq", "quantize", source, "--out", out, "--samples", samples, "--seq-len", seq_len]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--plan-only", action="store_true", help="print the estimate; write and quantize nothing")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for depth in [DEPTH[args.shape]] if args.plan_only else args.depths:
        folder = Path(tempfile.mkdtemp(prefix="awq-scale-", dir=args.folder))
        try:
            config = config_of(args.shape, depth)
            if args.plan_only:
                config.save_pretrained(folder / "source")
            else:
                write_checkpoint(folder / "source", config)
            decided = plan(folder / "source", samples=args.samples, seq_len=args.seq_len)
            row: dict[str, Any] = {"depth": depth, "checkpoint_gb": decided.bytes_before / 1e9}
            row["estimate_gb"] = decided.peak_bytes / 1e9
            if not args.plan_only:
                seconds, peak = quantize(folder / "source", folder / "out", args.samples, args.seq_len)
                row |= {"peak_gb": peak / 1e9, "seconds": seconds, "seconds_per_layer": seconds / depth}
            rows.append(row)
            print(
                "  ".join(
                    f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
                ),
                file=sys.stderr,
            )
        finally:
            shutil.rmtree(folder)
    if args.json:
        print(json.dumps({"shape": args.shape, "rows": rows}, indent=2))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"(this process, which writes the checkpoints: {own:.2f} GB)", file=sys.stderr)


if __name__ == "__main__":
    main()
