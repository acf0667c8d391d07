"""A tiny model, a tokenizer of words, and the text they are measured on."""

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 40


@pytest.fixture(scope="session")
def tokenizer():
    """Word "w7" is token 7; the beginning of text is 0."""
    words = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, VOCAB)}}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", model_max_length=8)


def build(seed: int, positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.5,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def model():
    return build(0)


@pytest.fixture(scope="session")
def other():
    return build(1)


@pytest.fixture(scope="session")
def ids():
    """The tokens of `text`."""
    return [0, *(random.Random(0).randrange(1, VOCAB) for _ in range(36))]


@pytest.fixture(scope="session")
def text(ids):
    return " ".join(f"w{i}" for i in ids[1:])
