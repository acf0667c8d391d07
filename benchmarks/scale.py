"""Peak memory and time against depth, or against experts: the estimate of `awq plan` beside what was really used.

    python benchmarks/scale.py                      depths 4, 8, 16, 32 of a small shape
    python benchmarks/scale.py --shape 7b --depths 32 --samples 4
    python benchmarks/scale.py --shape moe --depths 2 --experts 8 32 128
    python benchmarks/scale.py --depths 4 --samples 512 --offload FOLDER
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
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from awq_core import plan
from awq_core.testing.tiny import tiny_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8},
    # Wide inside and narrow outside, so that an expert's Gram matrix is larger than its weights.
    "moe": {"hidden_size": 512, "moe_intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 8},
}
DEPTH = {"small": 8, "7b": 32, "70b": 80, "moe": 2}


def config_of(shape: str, depth: int, experts: int) -> PretrainedConfig:
    common: dict[str, Any] = {
        **SHAPES[shape],
        "num_hidden_layers": depth,
        "vocab_size": 32000,
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not experts:
        return LlamaConfig(**common, architectures=["LlamaForCausalLM"])
    return Qwen3MoeConfig(
        **common, head_dim=64, num_experts=experts, num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"]
    )


def layer_shapes(config: PretrainedConfig, experts: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a layer; norms have one dimension."""
    hidden = config.hidden_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    inner = config.moe_intermediate_size if experts else config.intermediate_size
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    if not experts:
        return shapes | {f"mlp.{name}": shape for name, shape in mlp.items()}
    shapes |= {"self_attn.q_norm": (64,), "self_attn.k_norm": (64,), "mlp.gate": (experts, hidden)}
    return shapes | {f"mlp.experts.{e}.{name}": shape for e in range(experts) for name, shape in mlp.items()}


def write_checkpoint(folder: Path, config: PretrainedConfig, experts: int) -> None:
    """Random weights, one shard a layer, never more than a layer in memory."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    hidden = config.hidden_size
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)

    index: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    for layer in range(config.num_hidden_layers):
        tensors = {
            f"model.layers.{layer}.{name}.weight": random(*shape) if len(shape) > 1 else torch.ones(shape).bfloat16()
            for name, shape in layer_shapes(config, experts).items()
        }
        shard(f"layer-{layer:03d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": random(32000, hidden), "lm_head.weight": random(32000, hidden)}
    shard("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def quantize(source: Path, out: Path, options: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of `awq quantize` in its own process."""
    command = [sys.executable, "-c", CHILD, "awq", "quantize", str(source), "--out", str(out), *options]
    started = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - started, int(done.stdout.strip().splitlines()[-1])


CHILD = """
import sys
from pathlib import Path
from awq_core.cli import main
sys.argv = sys.argv[1:]
try:
    main()
finally:
    # ru_maxrss of a child begins at its parent's; this does not.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--depths", type=int, nargs="+", help="numbers of layers (default: 4 8 16 32; 2 for moe)")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128], help="of the moe shape")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--offload", type=Path, help="keep activations on this folder's disk")
    parser.add_argument("--plan-only", action="store_true", help="print the estimate; write and quantize nothing")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    depths = args.depths or ([DEPTH["moe"]] if args.shape == "moe" else [4, 8, 16, 32])
    cases = product([DEPTH[args.shape]] if args.plan_only else depths, args.experts if args.shape == "moe" else [0])
    options = ["--samples", str(args.samples), "--seq-len", str(args.seq_len)]
    options += ["--offload", str(args.offload)] if args.offload else []
    for depth, experts in cases:
        folder = Path(tempfile.mkdtemp(prefix="awq-scale-", dir=args.folder))
        try:
            config = config_of(args.shape, depth, experts)
            if args.plan_only:
                config.save_pretrained(folder / "source")
            else:
                write_checkpoint(folder / "source", config, experts)
            decided = plan(folder / "source", samples=args.samples, seq_len=args.seq_len)
            row: dict[str, Any] = {"depth": depth, "experts": experts, "checkpoint_gb": decided.bytes_before / 1e9}
            row["block_gb"] = max(block.parameters for block in decided.blocks) * 2 / 1e9
            row["estimate_gb"] = decided.peak_bytes / 1e9
            if not args.plan_only:
                seconds, peak = quantize(folder / "source", folder / "out", options)
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
