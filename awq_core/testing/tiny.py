"""Tiny models and tokenizers, made from nothing: no hub, no files, random weights."""

from __future__ import annotations

import copy
import string
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from awq_core.skeleton import model_class

END = "<|end|>"
# Fields of a configuration that are the same in most families: as small as grouped-query attention allows.
TINY_DECODER: dict[str, Any] = {
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
# Special tokens that vision-language processors look for.
IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")


def tiny_tokenizer(vocabulary: int = 128) -> Any:
    """A character-level tokenizer of printable ASCII with an end token and the usual image placeholders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [c for c in string.printable if c not in "\r\x0b\x0c"]
    tokens = [END, "<unk>", *IMAGE_TOKENS, *characters][:vocabulary]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token="<unk>",
        additional_special_tokens=list(IMAGE_TOKENS),
    )


def noise_image(seed: int, height: int, width: int) -> Any:
    """A PIL image of noise, for calibration with images. Needs pillow, `awq-core[vision]`."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(height, width, 3, generator=generator) * 255).byte().numpy())


def tiny_weights(
    config: PretrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, own_init: bool = False
) -> PreTrainedModel:
    """A model with random weights in which no norm is one and no bias zero.

    Args:
        own_init: the weights the model class gives itself instead: smaller, so that short dtypes lose less.
    """
    torch.manual_seed(seed)
    cls: Any = model_class(config)
    build = getattr(cls, "_from_config", None) or cls.from_config
    model = build(copy.deepcopy(config), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in () if own_init else model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.2 * noise)
    model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # `model.to` would take the imaginary part of complex tables
            tensor.data = tensor.data.to(dtype)
    return model.eval()


def save_tiny(
    config: PretrainedConfig,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    own_init: bool = False,
) -> PreTrainedModel:
    """Write a tiny model and its tokenizer as a checkpoint folder; returns the model. See `tiny_weights`."""
    model = tiny_weights(config, seed=seed, dtype=dtype, own_init=own_init)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
