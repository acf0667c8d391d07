"""Runs to report on: a dense model with flips, and a mixture whose head is quantized and one of whose parts is kept."""

from html.parser import HTMLParser

import pytest

import awq_core
from awq_core import QuantConfig
from awq_core.report import read_record


@pytest.fixture(scope="session")
def dense(llama_source, tmp_path_factory, corpus):
    """(folder, result) of a run with heuristic rounding. Never change it."""
    out = tmp_path_factory.mktemp("report") / "dense"
    config = QuantConfig(group_size=32, rounding="heuristic", max_flip_percent=0.2)
    return out, awq_core.quantize(llama_source, out, config=config, calibration=corpus, samples=4, seq_len=32)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory, tiny_options, corpus):
    """(folder, result) of a run on a mixture. Never change it."""
    from transformers import MixtralConfig

    from awq_core.testing.tiny import save_tiny

    folder = tmp_path_factory.mktemp("report")
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=1), folder / "source")
    config = QuantConfig(group_size=32, lm_head=True, modules_to_not_convert=("layers.1.self_attn",))
    out = folder / "mixture"
    return out, awq_core.quantize(folder / "source", out, config=config, calibration=corpus, samples=4, seq_len=32)


@pytest.fixture
def record(dense):
    return read_record(dense[0])


EMPTY = {"meta", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and the words a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.cells, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == [], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).split())

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="session")
def taken_apart():
    """taken_apart(html): see `Page`."""
    return Page
