"""Tiny checkpoints that several test files share. Built once; a test that damages one takes `model_folder`, a copy.

Nothing here imports torch before a fixture is used: the tests of hooks need none.
"""

import os
import shutil
from pathlib import Path

import pytest

# Tiny matrices gain nothing from threads, and threads that wait for one another lose a lot on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CORPUS = (
    "def add(a, b):\n    return a + b\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n" * 4,
    "The quick brown fox jumps over the lazy dog; 0123456789 times, or so they say.\n" * 4,
)


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch):
    """The environment of whoever runs the tests must not choose their kernels."""
    monkeypatch.delenv("AWQ_KERNEL", raising=False)


@pytest.fixture(scope="session")
def tiny_options():
    """Fields of a tiny text configuration; its widths are divisible by 32, the MLP's inner one not by 64."""
    return dict(TINY)


@pytest.fixture(scope="session")
def llama_config():
    """llama_config(num_hidden_layers=3): a tiny configuration with a few fields changed."""
    from transformers import LlamaConfig

    return lambda **options: LlamaConfig(**{**TINY, **options})


@pytest.fixture(scope="session")
def corpus():
    """Text for calibration, as a list."""
    return list(CORPUS)


@pytest.fixture(scope="session")
def llama_source(tmp_path_factory, llama_config) -> Path:
    """A tiny fp32 checkpoint with its tokenizer. Never change it."""
    from awq_core.testing import save_tiny

    folder = tmp_path_factory.mktemp("llama") / "source"
    save_tiny(llama_config(), folder)
    return folder


@pytest.fixture
def model_folder(llama_source, tmp_path) -> Path:
    """A copy of `llama_source`, to be damaged."""
    return Path(shutil.copytree(llama_source, tmp_path / "model"))


@pytest.fixture(scope="session")
def one_line():
    """one_line(error, "lm_head"): the message is one line, has every word, and returns it."""

    def check(error: BaseException, *words: str) -> str:
        text = str(error)
        assert text and "\n" not in text, f"not one line: {text!r}"
        for word in words:
            assert str(word) in text, f"{word!r} is not in {text!r}"
        return text

    return check


@pytest.fixture(scope="session")
def quantized_llama(tmp_path_factory, llama_source) -> Path:
    """`llama_source`, quantized in groups of 32 with scales and clips. Never change it."""
    import awq_core

    out = tmp_path_factory.mktemp("llama") / "quantized"
    config = awq_core.QuantConfig(group_size=32)
    awq_core.quantize(llama_source, out, config=config, calibration=list(CORPUS), samples=4, seq_len=32)
    return out
