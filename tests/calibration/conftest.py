"""A tokenizer whose ids can be worked out by eye: word "w7" is 7, the beginning of text is 0."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = 1000


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<s>": 0, **{f"w{i}": i for i in range(1, WORDS)}, "<user>": WORDS, "<bot>": WORDS + 1}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", model_max_length=16)
