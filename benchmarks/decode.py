"""Decoding and prefill of a 4-bit model against the bf16 model of the same shape, end to end, by `awq bench`.

    python benchmarks/decode.py                                    4 layers of Llama-2-7B, 1 and 2 threads
    python benchmarks/decode.py --model llama-3-8b --layers 8 --threads 2 --context 128,1024
    python benchmarks/decode.py --device cuda --layers 32 --fuse

Both checkpoints are made of random numbers, the 4-bit one straight in packed form, and deleted afterwards: speed does
not depend on what weights say. The vocabulary shrinks with the layers, so that the output head, which stays bf16, has
the share of the work that it has in the whole model, and a ratio read here is nearly that of all layers. `ceiling` is
the ratio of the bytes that one step reads: what decoding cannot exceed where memory is the limit of both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from kernels import GROUP, packed_at_random
from safetensors.torch import save_file
from transformers import LlamaConfig

from awq_core.checkpoint.format import quantization_config

# Sizes of transformers' configuration, with the layers and the vocabulary of the whole model.
MODELS: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
    },
}


def cut(model: str, layers: int, **more: Any) -> LlamaConfig:
    """The configuration with fewer layers and, in proportion, fewer tokens."""
    sizes = dict(MODELS[model])
    sizes["vocab_size"] = max(1024, sizes["vocab_size"] * layers // sizes["num_hidden_layers"] // 64 * 64)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    fields = {**sizes, **ids, "num_hidden_layers": layers, "max_position_embeddings": 8192, **more}
    return LlamaConfig(**fields, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def linears(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's linears."""
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden // config.num_attention_heads * config.num_key_value_heads
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, narrow),
        "self_attn.v_proj": (hidden, narrow),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def write(folder: Path, config: LlamaConfig, *, packed: bool) -> None:
    """A checkpoint of random numbers, one shard a layer."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    hidden, index = config.hidden_size, {}

    def random(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    for number in range(config.num_hidden_layers):
        base = f"model.layers.{number}"
        tensors = {f"{base}.{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        for place, (name, (inputs, outputs)) in enumerate(linears(config).items()):
            if packed:
                one = packed_at_random(inputs, outputs, seed=100 * number + place)
                # Codes less zero points spread by 6.5: this keeps outputs as large as inputs.
                scales = one.scales / (0.015 * 6.5 * inputs**0.5)
                parts = {"qweight": one.qweight, "qzeros": one.qzeros, "scales": scales.half()}
                tensors |= {f"{base}.{name}.{part}": tensor for part, tensor in parts.items()}
            else:
                tensors[f"{base}.{name}.weight"] = random(outputs, inputs)
        shard(f"layer-{number:03d}.safetensors", tensors)
    ends = {f"{name}.weight": random(config.vocab_size, hidden) for name in ("model.embed_tokens", "lm_head")}
    shard("ends.safetensors", ends | {"model.norm.weight": ones})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def ceiling(config: LlamaConfig) -> float:
    """Bytes that a step of the bf16 model reads over those of the 4-bit one."""
    weights = sum(inputs * outputs for inputs, outputs in linears(config).values()) * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size
    return (2 * weights + head) / ((0.5 + 2.5 / GROUP) * weights + head)  # a scale and a zero point: 2.5 bytes


def bench(folder: Path, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """One paired run of `awq bench` in a process of its own."""
    command = [sys.executable, "-m", "awq_core.cli", "bench", str(folder / "int4"), "--against", str(folder / "bf16")]
    command += ["--batch", options.batch, "--context", options.context, "--new", str(options.new)]
    command += ["--rounds", str(options.rounds), "--threads", str(threads), "--device", options.device, "--json"]
    command += [*(["--kernel", options.kernel] if options.kernel else []), *(["--fuse"] if options.fuse else [])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-2-7b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", default="1")
    parser.add_argument("--context", default="128")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernel", help="one of those `awq kernels` lists")
    parser.add_argument("--fuse", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    plain = cut(options.model, options.layers)
    settings = quantization_config(group_size=GROUP, modules_to_not_convert=["lm_head"])
    most, runs = ceiling(plain), []
    if not options.json:
        print(f"{options.layers} layers of {options.model}; int4 over bf16, ceiling of decode {most:.2f}")
        columns = f"{'threads':>7}{'load':>6}{'batch':>7}{'context':>9}{'prefill':>9}{'decode':>8}{'memory':>8}"
        print(f"{columns}  tokens a second", flush=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder / "bf16", plain, packed=False)
        write(folder / "int4", cut(options.model, options.layers, quantization_config=settings), packed=True)
        for threads in options.threads:
            runs.append(bench(folder, threads, options))
            if not options.json:
                tell(runs[-1])
    if options.json:
        print(json.dumps({"model": options.model, "layers": options.layers, "ceiling": most, "runs": runs}, indent=2))


def tell(run: dict[str, Any]) -> None:
    """The lines of one run."""
    for point in run["points"]:
        ratio, (mine, theirs) = point["ratio"], point["speeds"]
        start = f"{run['threads']:7}{run['load_average']:6.1f}{point['batch']:7}{point['context']:9}"
        rates = f"{mine['decode_tokens_per_second']:.1f} against {theirs['decode_tokens_per_second']:.1f}"
        print(f"{start}{ratio['prefill']:9.2f}{ratio['decode']:8.2f}{ratio['memory']:8.2f}  {rates}", flush=True)


if __name__ == "__main__":
    main()
