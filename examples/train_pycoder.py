"""Train `pycoder`, the small Llama that `make demo` quantizes, on the Python standard library's own source.

    python examples/train_pycoder.py --minutes 90 --out examples/pycoder

Every machine with Python has the data, so nothing is downloaded. Three things decide how good 6 M parameters get:

- *Data.* Licence headers, generated tables and test suites crowd out real code, so headers are cut, tables are dropped,
  and a batch takes only a quarter of its windows from the test suites (none in the last tenth of the run).
- *Held-out modules* (`HELD_OUT`) never enter training; `make demo` measures perplexity and divergence on them.
- *Optimizer.* Muon (orthogonalised momentum) for the matrices of the blocks, AdamW for embeddings and norms;
  constant learning rate, then linear decay over the last 60 % of the run.
"""

from __future__ import annotations

import argparse
import json
import re
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
HELD_OUT = (
    "asyncio/proactor_events.py",
    "bdb.py",
    "cgitb.py",
    "email/_policybase.py",
    "filecmp.py",
    "imaplib.py",
    "importlib/resources/abc.py",
    "locale.py",
    "mimetypes.py",
    "multiprocessing/managers.py",
    "queue.py",
    "shelve.py",
    "socket.py",
    "textwrap.py",
    "weakref.py",
    "wsgiref/simple_server.py",
    "xml/dom/minidom.py",
)
GENERATED = re.compile(r"^(encodings/|pydoc_data/|lib2to3/tests/data|test/encoded_modules|.*(unicodedata|_tables?)\b)")
TESTS = re.compile(r"(^|/)(test|tests|idle_test|turtledemo)/")


def clean(source: str) -> str:
    """Cut the comment block (licence, shebang, author) that opens a file, and trailing blanks."""
    lines = source.splitlines()
    start = 0
    while start < len(lines) and (not lines[start].strip() or lines[start].lstrip().startswith("#")):
        start += 1
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(line.rstrip() for line in lines[start:])) + "\n"


def standard_library() -> dict[str, list[str]]:
    """The library's source, split into `code`, `tests` and `held` texts; generated tables are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"code": [], "tests": [], "held": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or GENERATED.match(name):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not 200 < len(source) < 300_000:
            continue
        kind = "held" if name in HELD_OUT else "tests" if TESTS.search(name) else "code"
        parts[kind].append(clean(source))
    return parts


def train_tokenizer(parts: dict[str, list[str]], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the code (not the tests, not the held-out modules)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(parts["code"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=1024
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of ids, each opened by the end-of-text token. Returns [tokens] int64."""
    stream: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        stream += [0, *encoding.ids]
    return torch.tensor(stream)


def build_model() -> LlamaForCausalLM:
    """Llama, 5.8 M parameters; every in_features is a multiple of 128, so every AWQ group size divides."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor, windows: int = 40, length: int = 512) -> float:
    """Mean cross-entropy, nats a token, over the first `windows` windows of the held-out stream."""
    model.eval()
    losses = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, min(windows * length, len(ids) - length), length):
            window = ids[start : start + length][None]
            losses.append(model(input_ids=window, labels=window).loss.item())
    model.train()
    return sum(losses) / len(losses)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "held_out.json").write_text(json.dumps(HELD_OUT, indent=1) + "\n")


def train(
    model: torch.nn.Module,
    batch: Callable[[float], torch.Tensor],
    minutes: float,
    report: Callable[[int], None],
    learning_rates: tuple[float, float] = (3e-3, 2e-3),
) -> int:
    """Train for `minutes`; `batch(progress)` gives ids [batch, length], `report(step)` is called every 1000 steps.

    Muon works on the matrices of the blocks (first learning rate), AdamW on all the rest. Returns the number of steps.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=learning_rates[0], weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rates[1], betas=(0.9, 0.95), weight_decay=0.0),
    ]
    started, step, average, tokens = time.time(), 0, None, 0
    while (progress := (time.time() - started) / (minutes * 60)) < 1:
        decay = min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.6)
        for optimizer, lr in zip(optimizers, learning_rates, strict=True):
            optimizer.param_groups[0]["lr"] = lr * decay
        ids = batch(progress)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0:
            seconds = time.time() - started
            speed = tokens / seconds
            print(f"step {step}  {seconds / 60:.1f} min  {speed:.0f} tokens/s  loss {average:.3f}", flush=True)
        if step % 1000 == 0:
            report(step)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pycoder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    parts = standard_library()
    tokenizer = train_tokenizer(parts)
    streams = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    print({name: f"{len(ids) / 1e6:.2f} M tokens" for name, ids in streams.items()}, flush=True)

    def batch(progress: float) -> torch.Tensor:
        rows = []
        for _ in range(args.batch):
            kind = "tests" if progress < 0.9 and torch.rand(()) < 0.25 else "code"
            start = int(torch.randint(0, len(streams[kind]) - args.length, ()))
            rows.append(streams[kind][start : start + args.length])
        return torch.stack(rows)

    def report(step: int) -> None:
        print(f"held-out loss {held_out_loss(model, streams['held']):.3f}", flush=True)
        save(model, tokenizer, args.out)

    model = build_model()
    compiled: torch.nn.Module = torch.compile(model) if args.compile else model  # type: ignore[assignment]
    steps = train(compiled, batch, args.minutes, report)
    print(f"final held-out loss {held_out_loss(model, streams['held'], windows=200):.3f} after {steps} steps")
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
