"""Configurations of any architecture, made small: relations between widths stay, and every kind of block."""

import pytest
from transformers import CONFIG_MAPPING, GPTNeoXConfig, LlamaConfig

from awq_core.quantization.shrink import is_width, shrunken


def first(config):
    return next(iter(shrunken(config)))


def test_every_width_is_divided_by_the_same_number():
    widths = {"hidden_size": 4096, "intermediate_size": 11008, "head_dim": 128}
    small = first(LlamaConfig(**widths, num_attention_heads=32, num_key_value_heads=8))
    factor = 4096 // small.hidden_size
    assert factor == 128
    assert small.hidden_size == small.num_attention_heads * small.head_dim
    assert small.intermediate_size * factor == 11008
    assert (small.num_attention_heads, small.num_key_value_heads, small.num_hidden_layers) == (8, 2, 2)


def test_the_original_is_not_changed():
    config = LlamaConfig()
    before = config.to_dict()
    list(shrunken(config))
    assert config.to_dict() == before


def test_the_original_widths_are_among_the_candidates():
    widths = [small.hidden_size for small in shrunken(GPTNeoXConfig())]
    assert GPTNeoXConfig().hidden_size in widths
    assert widths[0] == min(widths)
    assert all(small.num_hidden_layers == 2 for small in shrunken(GPTNeoXConfig()))


def test_a_head_of_few_channels_comes_last():
    heads = [small.head_dim for small in shrunken(LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=128))]
    assert 4 <= heads[0] <= 8 and min(heads) < 4
    assert heads.index(min(heads)) > heads.index(128)


@pytest.mark.parametrize(("kind", "layers"), [("deepseek_v3", 3), ("jamba", 8), ("gemma2", 4)])
def test_every_kind_of_block_is_left(kind, layers):
    config = CONFIG_MAPPING[kind]()
    small = first(config)
    assert small.num_hidden_layers == layers
    for name in ("layer_types", "layers_block_type"):
        if getattr(config, name, None):
            assert set(getattr(small, name)) == set(getattr(config, name))
            assert len(getattr(small, name)) == layers


@pytest.mark.parametrize("name", ["hidden_size", "head_dim", "kv_lora_rank", "n_embd", "d_model", "mamba_d_head"])
def test_widths(name):
    assert is_width(name)


@pytest.mark.parametrize("name", ["vocab_size", "num_hidden_layers", "sliding_window", "image_size", "chunk_size"])
def test_no_widths(name):
    assert not is_width(name)
