"""The recipe beside the weights, for callers of the Python functions."""

import json

import pytest
import torch
import yaml

import awq_core
from awq_core import QuantConfig
from awq_core.calibration import text_batches
from awq_core.config import ConfigError
from awq_core.recipe import _portable, read_recipe

SETTINGS = {"config": QuantConfig(group_size=32), "samples": 2, "seq_len": 32}


def made(source, out, **options):
    """(the text of recipe.yaml, what it says)."""
    awq_core.quantize(source, out, **{**SETTINGS, **options})
    text = (out / "recipe.yaml").read_text(encoding="utf-8")
    return text, yaml.safe_load(text)


def test_who_made_it_is_a_comment(llama_source, tmp_path, corpus):
    text, _ = made(llama_source, tmp_path / "q", calibration=list(corpus))
    assert f"# awq-core {awq_core.__version__}, awq-plugin-llama " in text and f"torch {torch.__version__}" in text
    assert "trust" not in text


def test_samples_in_memory_are_a_comment(llama_source, tmp_path, corpus):
    text, saved = made(llama_source, tmp_path / "q", calibration=list(corpus))
    assert "# calib: it was given in memory" in text and "calib" not in saved
    assert (saved["samples"], saved["seq_len"]) == (2, 32)


def test_of_ready_batches_no_count_is_told(llama_source, tmp_path):
    data = text_batches([{"input_ids": list(range(1, 101))}], None, n_samples=1, seq_len=16)
    text, saved = made(llama_source, tmp_path / "q", calibration=data)
    assert "# calib: it was given in memory" in text and not {"calib", "samples", "seq_len"} & set(saved)


def test_the_default_source_is_a_comment_and_the_default_again(llama_source, tmp_path):
    text, saved = made(llama_source, tmp_path / "q")
    assert "# calib: the default" in text and "calib" not in saved


def test_the_length_of_windows_is_the_one_used(llama_config, tmp_path, corpus):
    from awq_core.testing import save_tiny

    save_tiny(llama_config(num_hidden_layers=1, max_position_embeddings=16), tmp_path / "short")
    _, saved = made(tmp_path / "short", tmp_path / "q", calibration=list(corpus))
    assert saved["seq_len"] == 16


def test_consent_to_code_is_not_passed_on(llama_source, tmp_path, corpus):
    text, saved = made(llama_source, tmp_path / "q", calibration=list(corpus), trust_remote_code=True)
    assert "# trust_remote_code: " in text and "trust_remote_code" not in saved


def test_what_is_read_is_what_was_written(llama_source, tmp_path, corpus):
    config = QuantConfig(group_size=32, modules_to_not_convert=("no", "1.10", "büro", "a: b", "#"))
    _, saved = made(llama_source, tmp_path / "q", config=config, calibration=list(corpus))
    read = read_recipe(tmp_path / "q" / "recipe.yaml")
    assert read["keep"] == saved["keep"] == list(config.modules_to_not_convert)
    flags = dict.fromkeys(("no_scale", "lm_head", "correct_bias"), "false")
    assert read == json.loads(json.dumps(saved), parse_int=str, parse_float=str) | flags


@pytest.mark.parametrize(
    ("name", "local", "text"),
    [
        ("org/name", False, "org/name"),
        ("pileval", False, "pileval"),
        ("MODEL", True, "./MODEL"),
        ("./MODEL/", True, "./MODEL"),
        ("data/c.jsonl", True, "./data/c.jsonl"),
        ("../MODEL", True, "../MODEL"),
        (".", True, "."),
        ("/somewhere/deep/MODEL", True, "./MODEL"),
        ("~/MODEL", True, "./MODEL"),
    ],
)
def test_names(name, local, text):
    assert _portable(name, local=local) == text


def test_the_reader_says_what_is_wrong(tmp_path, one_line):
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "none.yaml")
    one_line(caught.value, "none.yaml")
