"""The original's logits from disk: the same numbers to the last bit, one pass, a bounded folder."""

import json
import os

import pytest
import torch

from awq_core.errors import ConfigError, OutputError
from awq_core.evaluation import ReferenceLogits, divergence


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    model.save_pretrained(path)
    return path


class Opened:
    """Counts how often the original is opened, and how many windows it is run on."""

    def __init__(self, model):
        self.model, self.count, self.runs = model, 0, 0

    def __call__(self):
        self.count += 1
        model, outer = self.model, self

        class Counted(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, **kwargs):
                outer.runs += 1
                return self.inner(**kwargs)

        return Counted()


def entries(cache):
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_one_pass_serves_every_candidate(model, other, tokenizer, text, folder, tmp_path):
    opened = Opened(model)
    kept = ReferenceLogits(folder, tmp_path, opened)
    first = divergence(kept, other, tokenizer, text, window=12)
    assert first == divergence(model, other, tokenizer, text, window=12)
    assert (opened.count, opened.runs, kept.opened) == (1, 3, True)

    def never():
        raise AssertionError("opened again")

    again = ReferenceLogits(folder, tmp_path, never)
    assert divergence(again, other, tokenizer, text, window=12) == first and not again.opened
    assert divergence(again, model, tokenizer, text, window=12).kl_mean == 0
    (entry,) = entries(tmp_path)
    assert json.loads((tmp_path / entry / "entry.json").read_text()) == {
        "model": folder.name,
        "windows": 3,
        "window": 12,
    }


def test_bf16_is_kept_as_it_is(model, other, tokenizer, text, folder, tmp_path):
    import copy

    low = copy.deepcopy(model).bfloat16()
    kept = divergence(ReferenceLogits(folder, tmp_path, lambda: low), other, tokenizer, text, window=12)
    assert kept == divergence(low, other, tokenizer, text, window=12)
    assert kept != divergence(model, other, tokenizer, text, window=12)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert 3 * 12 * 40 * 2 <= size < 3 * (12 * 40 * 2 + 200)


@pytest.mark.parametrize("change", ["text", "window", "windows", "device", "model"])
def test_anything_else_has_an_entry_of_its_own(model, other, tokenizer, text, folder, tmp_path, change):
    cache = tmp_path / "cache"
    divergence(ReferenceLogits(folder, cache, lambda: model), other, tokenizer, text, window=12)
    opened, options = Opened(model), {"window": 13 if change == "window" else 12}
    if change == "windows":
        options["max_windows"] = 2
    source = folder
    if change == "model":
        source = tmp_path / "other"
        other.save_pretrained(source)
    device = "cuda" if change == "device" else "cpu"
    changed = ReferenceLogits(source, cache, opened, device=device)
    divergence(changed, other, tokenizer, "w5 " + text if change == "text" else text, **options)
    assert opened.count == 1 and len(entries(cache)) == 2


def test_what_a_killed_run_left_is_used_and_what_is_damaged_made_again(model, other, tokenizer, text, folder, tmp_path):
    expected = divergence(ReferenceLogits(folder, tmp_path, lambda: model), other, tokenizer, text, window=12)
    (entry,) = entries(tmp_path)
    (tmp_path / entry / "0001.safetensors").unlink()
    damaged = tmp_path / entry / "0002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    opened = Opened(model)
    assert divergence(ReferenceLogits(folder, tmp_path, opened), other, tokenizer, text, window=12) == expected
    assert (opened.count, opened.runs) == (1, 2)


def test_the_limit(model, other, tokenizer, text, folder, tmp_path):
    """Three windows of 12 x 40 fp32 logits are 5,760 bytes."""
    with pytest.raises(ConfigError, match="--max-windows 2"):
        refused = ReferenceLogits(folder, tmp_path / "small", lambda: model, limit=5759)
        divergence(refused, other, tokenizer, text, window=12)
    assert not list(tmp_path.rglob("*.safetensors"))
    texts = [f"w{number} {text}" for number in range(1, 5)]
    for number, one in enumerate(texts):
        kept = ReferenceLogits(folder, tmp_path, lambda: model, limit=14_000)
        divergence(kept, other, tokenizer, one, window=12)
        os.utime(kept._entry / "entry.json", (number, number))
        assert len(entries(tmp_path)) <= 3  # two and the folder of the one that was refused
    held = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert held <= 14_000
    opened = Opened(model)
    divergence(ReferenceLogits(folder, tmp_path, opened, limit=14_000), other, tokenizer, texts[-1], window=12)
    assert not opened.count  # the youngest stayed


def test_nothing_else_in_the_folder_is_touched(model, other, tokenizer, text, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "entry.json").write_text("{}")
    (tmp_path / ("a" * 64)).mkdir()  # a name like ours without our file
    (tmp_path / ("a" * 64) / "big").write_bytes(bytes(20_000))
    divergence(ReferenceLogits(folder, tmp_path, lambda: model, limit=6000), other, tokenizer, text, window=12)
    assert (tmp_path / "mine" / "entry.json").exists() and (tmp_path / ("a" * 64) / "big").exists()


def test_numbers_are_remembered(folder, tmp_path):
    kept = ReferenceLogits(folder, tmp_path, lambda: None)
    assert kept.remember(kept.key("a"), lambda: {"x": 0.1}) == {"x": 0.1}
    assert kept.remember(kept.key("a"), lambda: {"x": 2}) == {"x": 0.1}
    assert kept.remember(kept.key("b"), lambda: {"x": 2}) == {"x": 2}
    assert kept.key("ab", "c") != kept.key("a", "bc")
    (tmp_path / f"{kept.key('a')}.json").write_text("{")
    assert kept.remember(kept.key("a"), lambda: {"x": 3}) == {"x": 3}


def test_a_folder_that_cannot_be_written(model, other, tokenizer, text, folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        divergence(ReferenceLogits(folder, tmp_path / "file", lambda: model), other, tokenizer, text, window=12)
