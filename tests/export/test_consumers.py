"""Exports opened by the programs they are for, which then compute what this project does."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import awq_core
from awq_core.checkpoint.pack import dequantize
from awq_core.errors import CheckpointError, OutputError
from awq_core.export.formats import export_checkpoint
from awq_core.export.source import open_source

IDS = torch.arange(8, 40)[None]


@pytest.fixture(scope="module")
def bf16_llama(tmp_path_factory, llama_config, corpus):
    from awq_core.testing import save_tiny

    folder = tmp_path_factory.mktemp("consumers")
    save_tiny(llama_config(), folder / "source", dtype=torch.bfloat16)
    config = awq_core.QuantConfig(group_size=32, modules_to_not_convert=("layers.1.mlp.down_proj",))
    awq_core.quantize(folder / "source", folder / "DIR", config=config, calibration=corpus, samples=4, seq_len=32)
    return folder / "DIR"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def continuation(model):
    with torch.no_grad():
        return model.generate(IDS, max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)


def expect_the_same(found, folder):
    """The weights are (q - z) · s rounded to the dtype of s; logits and greedy tokens are those of this project's model
    with its weights rounded likewise."""
    ours = awq_core.load(folder, fake_quant=True, dtype="float32")
    exact = logits(ours)
    with open_source(folder) as source:
        for name, path in source.linears.items():
            packed = source.linear(name)
            weight = dequantize(packed, packed.scales.dtype).float()
            assert torch.equal(found.get_submodule(path).weight.float(), weight), name
            ours.get_submodule(path).weight.copy_(weight)
    found = found.float()
    torch.testing.assert_close(logits(found), logits(ours), rtol=1e-5, atol=1e-5)
    assert torch.equal(continuation(found), continuation(ours))
    # What 16 bits cost: a part in 2000 of a weight in float16, in 250 in bfloat16.
    cost = 1e-2 if packed.scales.dtype == torch.float16 else 8e-2
    torch.testing.assert_close(logits(found), exact, rtol=0, atol=cost)


def from_pretrained(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@pytest.mark.parametrize("to", ["compressed-tensors", "scaled-fp16"])
@pytest.mark.parametrize("name", ["quantized_llama", "bf16_llama"])
def test_transformers(name, to, request, tmp_path):
    if to == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    folder = request.getfixturevalue(name)
    made = export_checkpoint(folder, tmp_path / "x", to).out
    expect_the_same(from_pretrained(made), folder)
    tokens = AutoTokenizer.from_pretrained(made)("def add(a, b):").input_ids
    assert tokens == AutoTokenizer.from_pretrained(folder)("def add(a, b):").input_ids


def test_transformers_reads_whole_rows_and_a_quantized_head(llama_source, tmp_path):
    pytest.importorskip("compressed_tensors")
    settings = awq_core.QuantConfig(group_size=-1, scale=False, clip="none", lm_head=True)
    awq_core.quantize(llama_source, tmp_path / "DIR", config=settings)
    made = export_checkpoint(tmp_path / "DIR", tmp_path / "x", "compressed-tensors").out
    model = from_pretrained(made)
    with open_source(tmp_path / "DIR") as source:
        assert "lm_head" in source.linears
    expect_the_same(model, tmp_path / "DIR")


def quantized_plainly(config, folder):
    from awq_core.testing import save_tiny

    save_tiny(config, folder / "source")
    settings = awq_core.QuantConfig(group_size=32, scale=False, clip="none")
    awq_core.quantize(folder / "source", folder / "DIR", config=settings)
    return folder / "DIR"


def test_unpacked_linears_lie_as_they_did(tmp_path):
    """GPT-2 stores its weights inputs first."""
    from transformers import GPT2Config

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64)
    folder = quantized_plainly(config, tmp_path)
    made = export_checkpoint(folder, tmp_path / "x", "scaled-fp16").out
    torch.testing.assert_close(
        logits(from_pretrained(made).float()), logits(awq_core.load(folder, dtype="float32")), rtol=0, atol=1e-2
    )


def test_unpacked_experts_find_their_stacks(tmp_path, tiny_options):
    from transformers import MixtralConfig

    folder = quantized_plainly(MixtralConfig(**tiny_options, num_local_experts=4, num_experts_per_tok=2), tmp_path)
    made = export_checkpoint(folder, tmp_path / "x", "scaled-fp16").out
    torch.testing.assert_close(
        logits(from_pretrained(made).float()), logits(awq_core.load(folder, dtype="float32")), rtol=0, atol=1e-2
    )


@pytest.mark.parametrize("to", ["compressed-tensors", "scaled-fp16"])
def test_a_model_with_images(tmp_path, tiny_options, to):
    """Its linears have other names in the file than in the model; the vision tower is kept."""
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**tower, image_size=16, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**tiny_options), image_token_index=2)
    folder = quantized_plainly(config, tmp_path)
    made = export_checkpoint(folder, tmp_path / "x", to).out
    model, info = AutoModelForImageTextToText.from_pretrained(made, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expect_the_same(model, folder)


def test_experts_that_transformers_cannot_stack(tmp_path, tiny_options, one_line):
    from transformers import GptOssConfig

    config = GptOssConfig(**{**tiny_options, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2})
    folder = quantized_plainly(config, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(folder, tmp_path / "x", "scaled-fp16")
    one_line(caught.value, "no place for", "experts")
    assert not (tmp_path / "x").exists()


def test_torch(quantized_llama, tmp_path):
    made = export_checkpoint(quantized_llama, tmp_path / "x", "torch").out
    state = torch.load(made / "model.pt", weights_only=True)
    with open_source(quantized_llama) as source:
        assert list(state) == list(source.reader.names)
        for name, tensor in state.items():
            expected = source.reader.tensor(name)
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    assert not list(made.glob("*.safetensors"))
    assert json.loads((made / "config.json").read_text())["quantization_config"]["version"] == "gemm"


def test_a_disk_that_torch_cannot_write_to(quantized_llama, tmp_path, monkeypatch, one_line):
    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] .\nunexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError) as caught:
        export_checkpoint(quantized_llama, tmp_path / "x", "torch")
    one_line(caught.value, "model.pt", "disk full")
    assert not (tmp_path / "x").exists()


def test_torch_is_made_of_gemm(quantized_llama, tmp_path, one_line):
    other = export_checkpoint(quantized_llama, tmp_path / "gptq", "gptq_v2").out
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(other, tmp_path / "x", "torch")
    one_line(caught.value, "gptq_v2", "awq import")
