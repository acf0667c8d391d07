"""The demo model, quantized: it has a tokenizer of its own and writes text, so that tokens mean something."""

import logging
from pathlib import Path

import pytest

import awq_core
from awq_core.export.formats import export_checkpoint

from .gguf_models import quantized
from .gguf_tokenizers import sentencepiece_like

PYCODER = Path(__file__).parents[2] / "examples" / "pycoder"


@pytest.fixture(scope="session")
def quantized_pycoder(tmp_path_factory, corpus) -> Path:
    """`examples/pycoder` in groups of 32, with scales and clips. Never change it."""
    folder = tmp_path_factory.mktemp("pycoder") / "DIR"
    awq_core.quantize(
        PYCODER, folder, config=awq_core.QuantConfig(group_size=32), calibration=corpus, samples=2, seq_len=32
    )
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_trace_records():
    """torch records each step of a trace for a log that pytest would keep; keeping it takes longer than the trace."""
    logger = logging.getLogger("torch.__trace")
    before, logger.propagate = logger.propagate, False
    yield
    logger.propagate = before


@pytest.fixture(scope="session")
def exported(quantized_pycoder, tmp_path_factory):
    """exported("gguf"): the demo model's folder of that export. Never change it."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def export(to):
        if to not in made:
            made[to] = export_checkpoint(quantized_pycoder, folder / to, to).out
        return made[to]

    return export


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory, llama_config):
    """A tiny model with a tokenizer of pieces. Never change it."""
    folder = tmp_path_factory.mktemp("pieces")
    made = quantized(llama_config(vocab_size=720, num_hidden_layers=1), folder)
    sentencepiece_like(made)
    return made
