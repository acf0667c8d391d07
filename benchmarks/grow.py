"""Grow the example model into architectures it is not, to measure accuracy on more than one kind of model.

    python benchmarks/grow.py qwen2   --text wiki.txt plays.txt --out models/qwen2
    python benchmarks/grow.py mixtral --text wiki.txt plays.txt --out models/mixtral

A model of a few million parameters needs hours from nothing and minutes from a relative:

- `qwen2`: the same matrices; the biases of q, k and v begin at zero and are trained.
- `mixtral`: sparse upcycling (Komatsuzaki et al. 2023, arXiv:2212.05055). Eight experts begin as copies of the MLP, two
  of them answer for each token. A quarter of each expert's hidden units is drawn anew, so that experts grow apart
  (drop-upcycling, Nakamura et al. 2025, arXiv:2502.19261).

Both then train on the example's code and, for half of the windows, on the prose of `--text`, so that they know two
domains. A tenth of each text, its end, is kept out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from train_pycoder import encode, held_out_loss, save, standard_library, train  # noqa: E402

# What both have in common with Llama.
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
)
EXPERTS, DRAWN_ANEW = 8, 0.25


def qwen2(source: LlamaForCausalLM) -> Qwen2ForCausalLM:
    """The same function: Llama with (zero) biases on q, k and v."""
    model = Qwen2ForCausalLM(Qwen2Config(**{name: getattr(source.config, name) for name in SHAPE}))
    weights = source.state_dict()
    biases = {name: torch.zeros_like(value) for name, value in model.state_dict().items() if name.endswith("bias")}
    model.load_state_dict(weights | biases)
    return model


def mixtral(source: LlamaForCausalLM) -> MixtralForCausalLM:
    """Nearly the same function: every expert a copy of the MLP, but for a quarter of its hidden units."""
    shape = {name: getattr(source.config, name) for name in SHAPE}
    config = MixtralConfig(
        **shape, head_dim=source.config.head_dim, num_local_experts=EXPERTS, num_experts_per_tok=2, sliding_window=None
    )
    config.router_aux_loss_coef, config.output_router_logits = 0.01, True
    model = MixtralForCausalLM(config)
    weights = {name: value for name, value in source.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(weights, strict=False)
    for block, old in zip(model.model.layers, source.model.layers, strict=True):
        gate_up = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]).detach()
        down = old.mlp.down_proj.weight.detach()
        for expert in range(EXPERTS):
            anew = torch.rand(down.shape[1]) < DRAWN_ANEW
            first, second = gate_up.clone(), down.clone()
            first[torch.cat([anew, anew])] = torch.randn(2 * int(anew.sum()), first.shape[1]) * first.std()
            second[:, anew] = torch.randn(second.shape[0], int(anew.sum())) * second.std()
            block.mlp.experts.gate_up_proj.data[expert] = first
            block.mlp.experts.down_proj.data[expert] = second
    return model


GROW = {"qwen2": qwen2, "mixtral": mixtral}


def streams(tokenizer: object, texts: list[Path]) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Ids of the code, of each prose text without its last tenth, and of the held-out modules."""
    parts = standard_library()
    prose = [path.read_text(encoding="utf-8") for path in texts]
    prose = [text[: len(text) * 9 // 10] for text in prose]
    return (
        encode(tokenizer, parts["code"] + parts["tests"]),
        [encode(tokenizer, [text]) for text in prose],
        encode(tokenizer, parts["held"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(GROW))
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=EXAMPLES / "pycoder",
        help="a Llama, or a model of this kind to go on with",
    )
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files of prose")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.source)
    code, prose, held = streams(tokenizer, args.text)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    if model.config.model_type != args.kind:
        model = GROW[args.kind](model)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; held-out loss at the beginning "
        f"{held_out_loss(model, held):.3f}",
        flush=True,
    )

    def batch(progress: float) -> torch.Tensor:
        rows = []
        for row in range(args.batch):
            stream = prose[row // 2 % len(prose)] if prose and row % 2 else code
            start = int(torch.randint(0, len(stream) - args.length, ()))
            rows.append(stream[start : start + args.length])
        return torch.stack(rows)

    def report(step: int) -> None:
        print(f"held-out loss {held_out_loss(model, held):.3f}", flush=True)
        save(model, tokenizer, args.out)

    steps = train(model, batch, args.minutes, report, learning_rates=(1.5e-3, 1e-3))
    report(steps)


if __name__ == "__main__":
    main()
