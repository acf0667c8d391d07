"""Memory and speed of reading: bits per byte over a compressed corpus that is larger than the memory it may take.

    python benchmarks/bits_per_byte.py                  2 GB of text as .jsonl.zst, deleted afterwards
    python benchmarks/bits_per_byte.py --gigabytes 0.2

The model is a table of sixteen equal logits, so that what is measured is what lies around a model: decompressing,
parsing, choosing subsets, counting. The figures of each subset are compared with those of a run on that subset alone.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import zstandard

from awq_core.calibration import Subsets, read_samples
from awq_core.evaluation import bits_per_byte

SUBSETS = {"Pile-CC": 60, "ArXiv": 30, "Github": 9, "Enron Emails": 1}  # weights of the draw
TOKENS = 50


class Uniform(torch.nn.Module):
    """The same logit for each of sixteen tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(16))
        self.config = SimpleNamespace(max_position_embeddings=64)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 16))


class Letters:
    """A token each for the first letters of a document."""

    bos_token_id = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 16 for letter in text[:TOKENS]]}


def write(path: Path, size: float) -> Counter[str]:
    """Documents of random words until their lines have `size` bytes; the bytes of text of each subset."""
    draw, written, texts = random.Random(0), 0, Counter[str]()
    words = [f"{draw.getrandbits(40):x}" for _ in range(5000)]
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=1).stream_writer(raw) as stream:
        while written < size:
            (name,) = draw.choices(list(SUBSETS), list(SUBSETS.values()))
            text = " ".join(draw.choices(words, k=2000))
            line = (json.dumps({"text": text, "meta": {"pile_set_name": name}}) + "\n").encode()
            stream.write(line)
            written, texts[name] = written + len(line), texts[name] + len(text.encode())
    return texts


def peak() -> float:
    """Megabytes this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pile.jsonl.zst"
        texts = write(path, options.gigabytes * 1e9)
        model, before, started = Uniform(), peak(), time.perf_counter()
        result = bits_per_byte(model, Letters(), read_samples(path))
        seconds = time.perf_counter() - started
        print(f"{sum(texts.values()) / 1e9:.2f} GB of text in {path.stat().st_size / 1e9:.2f} GB, {seconds:.1f} s")
        print(f"peak memory {before:.0f} MB before, {peak():.0f} MB after")
        assert {name: one.bytes for name, one in result.subsets.items()} == texts
        rare = Subsets(include=("Enron Emails",))
        alone = bits_per_byte(model, Letters(), read_samples(path, subsets=rare))
        assert alone.total == result.subsets["Enron Emails"]
        for name, one in result.subsets.items():
            print(f"{name:12}  {one.bits_per_byte:.5f} bits per byte, {one.documents} documents")


if __name__ == "__main__":
    main()
