"""Quality on a trained model: AWQ is closer to the original than round-to-nearest, much closer with outliers.

The model is the demo's. Its outlier twin computes the same function with a few channels of every norm made 32 times as
large and the weights that read them 32 times as small, which is what outlier channels of large models look like."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq_core import QuantConfig, load, quantize
from awq_core.calibration.sources import standard_library
from awq_core.evaluation import divergence

PYCODER = Path(__file__).parents[1] / "examples" / "pycoder"
NEAREST = QuantConfig(group_size=128, scale=False, clip="none")
HELD_OUT = tuple(json.loads((PYCODER / "held_out.json").read_text()))


def text_of_held_out_modules():
    root = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join(path.read_text() for name in HELD_OUT if (path := root / name).exists())


PROSE = (Path(__file__).parents[1] / "LICENSE").read_text()


def make_outliers(source, target, factor=32.0):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:24]
            norm.weight.data[channels] *= factor
            for reader in readers:
                reader.weight.data[:, channels] /= factor
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


@pytest.fixture(scope="module")
def outlier_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outliers")
    make_outliers(PYCODER, folder)
    return folder


def kl(source, out, config, text):
    samples = list(standard_library(exclude=HELD_OUT))
    quantize(source, out, config=config, calibration=samples if config.needs_calibration else None, samples=16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    reference, candidate = (load(folder, dtype="float32", fake_quant=True) for folder in (source, out))
    return divergence(reference, candidate, tokenizer, text, window=256, max_windows=16)


@pytest.mark.parametrize("text", ["code", "prose"])
def test_awq_is_closer_to_the_original_than_rounding(tmp_path, text):
    text = text_of_held_out_modules() if text == "code" else PROSE
    nearest = kl(PYCODER, tmp_path / "nearest", NEAREST, text)
    awq = kl(PYCODER, tmp_path / "awq", QuantConfig(group_size=128), text)
    assert awq.kl_mean < nearest.kl_mean - awq.kl_stderr
    assert awq.top1_agreement > nearest.top1_agreement - 0.01


def test_outlier_channels_cost_rounding_ten_times_as_much(tmp_path, outlier_model):
    text = text_of_held_out_modules()
    nearest = kl(outlier_model, tmp_path / "nearest", NEAREST, text)
    awq = kl(outlier_model, tmp_path / "awq", QuantConfig(group_size=128), text)
    assert nearest.kl_mean > 10 * awq.kl_mean
