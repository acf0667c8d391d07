"""What quantize writes, read by others: transformers' own AWQ settings, and every tensor's name, shape and dtype."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoTokenizer,
    AwqConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
)

import awq_core
from awq_core import QuantConfig
from awq_core.checkpoint.format import expected_tensors
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.testing import save_tiny


def on_disk(folder):
    with CheckpointReader(folder) as reader:
        return {name: (reader.shape(name), reader.dtype(name)) for name in reader.names}


def test_transformers_reads_the_settings(quantized_llama):
    section = AutoConfig.from_pretrained(quantized_llama).quantization_config
    parsed = AwqConfig.from_dict(section)
    assert parsed.quant_method == "awq"
    assert (parsed.bits, parsed.group_size, parsed.zero_point, parsed.format) == (4, 32, True, "gemm")
    assert parsed.modules_to_not_convert == ["lm_head"]


def test_the_rest_of_the_configuration_is_the_originals(quantized_llama, llama_source):
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (llama_source, quantized_llama))
    del after["quantization_config"]
    assert after == before


def test_the_folder_is_complete(quantized_llama, llama_source):
    names = {path.name for path in quantized_llama.iterdir()}
    made = {"README.md", "recipe.yaml", "awq_report.json", "calibration"}
    assert names == {path.name for path in llama_source.iterdir()} | made
    assert (
        AutoTokenizer.from_pretrained(quantized_llama)("def")["input_ids"]
        == AutoTokenizer.from_pretrained(llama_source)("def")["input_ids"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_every_tensor_is_the_one_expected(tmp_path, llama_config, dtype, group_size):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(llama_config(num_hidden_layers=1, attention_bias=True), source, dtype=dtype)
    settings = QuantConfig(group_size=group_size, scale=False, clip="none", modules_to_not_convert=("o_proj",))
    plan = awq_core.quantize(source, out, config=settings).plan
    expected = on_disk(source)
    step = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
    quantized = [linear for linear in plan.linears if linear.quantize]
    assert len(quantized) == (5 if group_size == 64 else 6)
    for linear in quantized:
        expected.pop(f"{linear.name}.weight")
        expected |= expected_tensors(linear.name, linear.in_features, linear.out_features, group_size, step)
    assert on_disk(out) == expected
    assert AutoConfig.from_pretrained(out).quantization_config["group_size"] == group_size


def test_names_are_the_original_checkpoints(tmp_path, tiny_options):
    """Experts are stacked in transformers' memory and single on disk, where engines look for them."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(MixtralConfig(**tiny_options, num_local_experts=3), source)
    awq_core.quantize(source, out, config=QuantConfig(group_size=32, scale=False, clip="none"))
    before, after = on_disk(source), on_disk(out)
    logical = {
        name.removesuffix(".qweight") + ".weight" if name.endswith(".qweight") else name
        for name in after
        if not name.endswith((".qzeros", ".scales"))
    }
    assert logical == set(before)
    assert "model.layers.1.block_sparse_moe.experts.2.w3.qweight" in after
    kept = AutoConfig.from_pretrained(out).quantization_config["modules_to_not_convert"]
    routers = [f"model.layers.{i}.{block}.gate" for i in range(2) for block in ("block_sparse_moe", "mlp")]
    assert set(kept) >= {"lm_head"}
    for name in (name.removesuffix(".qweight") for name in after if name.endswith(".qweight")):
        assert not any(prefix in name for prefix in kept), name
    for router in routers:
        assert f"{router}.qweight" not in after


def test_kept_prefixes_are_names_on_disk_too(tmp_path, tiny_options):
    """transformers compares them with names in memory, vLLM with names on disk; LLaVA's differ."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=16, patch_size=4),
        text_config=LlamaConfig(**tiny_options),
        image_token_index=2,
    )
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config, source)
    settings = QuantConfig(group_size=32, scale=False, clip="none")
    plan = awq_core.quantize(source, out, config=settings).plan
    kept = AutoConfig.from_pretrained(out).quantization_config["modules_to_not_convert"]
    before, after = on_disk(source), on_disk(out)
    quantized = {name.removesuffix(".qweight") for name in after if name.endswith(".qweight")}
    assert len(quantized) == 14 and all(name.startswith("language_model.model.layers.") for name in quantized)
    matrices = {name.removesuffix(".weight") for name, (shape, _) in before.items() if len(shape) == 2}
    for name in matrices - {"language_model.model.embed_tokens"}:
        if "embedding" not in name:
            assert any(prefix in name for prefix in kept) == (name not in quantized), name
    for linear in plan.linears:
        assert any(prefix in linear.name for prefix in kept) == (not linear.quantize), linear.name


def test_what_is_kept_is_copied_bit_for_bit(tmp_path, llama_config, corpus):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(llama_config(), source, dtype=torch.bfloat16)
    config = QuantConfig(group_size=32, modules_to_not_convert=("layers.0.",))
    awq_core.quantize(source, out, config=config, calibration=corpus, samples=4, seq_len=32)
    with CheckpointReader(source) as before, CheckpointReader(out) as after:
        same = [name for name in before.names if "layers.1." not in name]
        assert len(same) == 12 and all(torch.equal(before.tensor(name), after.tensor(name)) for name in same)


def test_the_file_says_pt(quantized_llama):
    """transformers refuses a safetensors file without this."""
    with safe_open(quantized_llama / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
