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


# -- a vision-language model


@pytest.fixture(scope="session")
def llava_plugin():
    """Arguments of `PluginManager.register`: a plugin for `tiny_llava`, with three components."""
    import types

    from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, hookimpl, presets

    stacks = {
        "vision": "model.vision_tower.encoder.layers",
        "projector": "model.multi_modal_projector",
        "language": "model.language_model.layers",
    }
    architecture = Architecture(
        family="tiny",
        model_types=("llava",),
        stacks=tuple(LayerStack(component=name, blocks=blocks) for name, blocks in stacks.items()),
        scale_groups=presets.LLAMA_BLOCK,
        components=(
            ComponentPolicy(component="language", action="quantize"),
            ComponentPolicy(component="vision", action="keep"),
            ComponentPolicy(component="projector", action="keep"),
        ),
    )
    module = types.ModuleType("tiny_plugin")
    module.awq_architectures = hookimpl(lambda: (architecture,))
    return module, "tiny", "awq-plugin-tiny", "1.2"


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory, tiny_options):
    """A tiny LLaVA with its own processor; "<image>" is token 2. Never change it."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    from awq_core.testing import save_tiny, tiny_tokenizer

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tower, image_size=16, patch_size=4)
    folder = tmp_path_factory.mktemp("llava") / "source"
    save_tiny(LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny_options), image_token_index=2), folder)
    side = {"height": 16, "width": 16}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side),
        tokenizer=tiny_tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Five noise images with captions of unequal length."""
    import torch
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        pixels = (torch.rand(16 + 4 * index, 20, 3, generator=generator) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}" + index * " of noise")
    return folder


@pytest.fixture
def llava_awq(monkeypatch, llava_plugin):
    """llava_awq("eval", folder, ...): the program's result, with the plugin for `tiny_llava` and no other."""
    from click.testing import CliRunner

    from awq_core.cli.app import cli
    from awq_core.hooks.manager import default_manager, reset_default_manager

    monkeypatch.setenv("AWQ_PLUGINS", "")
    reset_default_manager()
    default_manager().register(*llava_plugin)
    yield lambda *words: CliRunner().invoke(cli, [str(word) for word in words])
    reset_default_manager()
