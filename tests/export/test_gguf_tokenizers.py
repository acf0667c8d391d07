"""What a GGUF file says of the tokenizer; `test_llama_cpp` lets llama.cpp cut text with it."""

import pytest

from awq_core.errors import CheckpointError
from awq_core.export.formats import export_checkpoint
from awq_core.export.gguf_tokenizer import PRE, leading_space, pre, scores

from .gguf_models import opened
from .gguf_tokenizers import LLAMA3, PIECES, TEXTS, bytes_after, splitting

pytest.importorskip("gguf")


def test_names_of_patterns(one_line):
    assert pre(bytes_after()) == "gpt-2"
    assert pre(bytes_after(LLAMA3, ignore_merges=True)) == "llama-bpe"
    assert pre(bytes_after(LLAMA3)) == "smaug-bpe"
    assert pre(bytes_after(LLAMA3.replace("{1,3}", ""), normalizer={"type": "NFC"})) == "qwen2"
    for other in (bytes_after("."), bytes_after(normalizer={"type": "Lowercase"})):
        with pytest.raises(CheckpointError) as caught:
            pre(other)
        one_line(caught.value, "tokenizer")


def test_texts_tell_the_ways_to_split_apart():
    from tokenizers import Tokenizer

    made = [Tokenizer.from_str(splitting(steps)) for steps in PRE]
    assert len({tuple(tuple(one.encode(text).ids) for text in (*TEXTS, *PIECES)) for one in made}) == len(PRE)


def test_scores_are_ranks():
    assert scores(["a", "b", "ab", "abb"], [["a", "b"], "ab b"]) == [-2, -2, 0, -1]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    assert leading_space({"pre_tokenizer": space})
    assert not leading_space({"pre_tokenizer": {**space, "prepend_scheme": "never"}})
    assert leading_space({"normalizer": {"type": "Prepend", "prepend": "\u2581"}})


def test_a_tokenizer_of_pieces(sentencepiece_folder, tmp_path):
    _, fields = opened(export_checkpoint(sentencepiece_folder, tmp_path / "x", "gguf").out)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[258:261] == [6, 1, 1] and set(kinds[700:]) == {5}
    assert len(fields["tokenizer.ggml.tokens"]) == 720
    found = fields["tokenizer.ggml.scores"]
    assert max(found[300:]) <= 0 and found[650] > found[699]
