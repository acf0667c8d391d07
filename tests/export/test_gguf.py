"""GGUF: read back by the `gguf` package, which shares no code with the writer here but the file's layout."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import awq_core
from awq_core.checkpoint.pack import dequantize, pack_linear
from awq_core.errors import CheckpointError, ConfigError, NumericsError
from awq_core.export.formats import export_checkpoint
from awq_core.export.gguf_blocks import Fidelity, q4_1
from awq_core.export.gguf_rope import rope_divisors
from awq_core.export.gguf_tensors import grouped_rows, paired_rows

from .gguf_models import HALF, opened, quantized, tiny_config

gguf = pytest.importorskip("gguf")


def packed_linear(scale, zeros, rows=128, group=32, dtype=torch.float16):
    codes = torch.randint(0, 16, (len(scale), rows), generator=torch.Generator().manual_seed(0))
    return codes, pack_linear(codes, scale, zeros, dtype)


def decoded(array):
    return torch.from_numpy(gguf.quants.dequantize(array, gguf.GGMLQuantizationType.Q4_1))


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [32, 64, 128])
def test_steps_that_float16_holds_are_exact(group):
    """Powers of two times any zero point."""
    shape = (8, 128 // group)
    generator = torch.Generator().manual_seed(1)
    zeros = torch.randint(0, 16, shape, generator=generator)
    _, packed = packed_linear(2.0 ** torch.randint(-9, 2, shape, generator=generator), zeros, group=group)
    array, fidelity = q4_1("a", packed)
    assert array.shape == (8, 80)
    assert torch.equal(decoded(array), dequantize(packed))
    assert fidelity == Fidelity(blocks=32) and "exact" in str(fidelity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_fidelity_that_is_told_is_the_one_there_is(dtype):
    generator = torch.Generator().manual_seed(2)
    zeros = torch.randint(0, 16, (64, 4), generator=generator)
    codes, packed = packed_linear(torch.rand(64, 4, generator=generator) / 7, zeros, dtype=dtype)
    array, fidelity = q4_1("a", packed)
    steps = packed.scales.t().float().repeat_interleave(32, 1)
    off = ((decoded(array) - dequantize(packed)) / steps).abs().reshape(64, 4, 32)
    assert 0 < fidelity.rounded < 256 and fidelity.rounded >= int((off.amax(-1) > 1e-5).sum())
    # Both sums are rounded in float32, a step of which is a part in 2**20 of ours here.
    assert off.max() <= fidelity.worst + 1e-5 and off.max() > 0.9 * fidelity.worst
    assert fidelity.worst < 15 / 2**11 + 1e-6
    found = (array.reshape(64, 4, 20)[..., 4:, None] >> np.array([0, 4], dtype=np.uint8)) & 15
    assert np.array_equal(found.transpose(0, 1, 3, 2).reshape(64, 128), codes.numpy())
    assert f"{fidelity.worst:.1%}" in str(fidelity)


def test_what_float16_cannot_hold(one_line):
    _, packed = packed_linear(torch.full((8, 4), 1e5), torch.full((8, 4), 3), dtype=torch.bfloat16)
    with pytest.raises(NumericsError) as caught:
        q4_1("layers.0.q", packed)
    one_line(caught.value, "layers.0.q", "float16")


# -- files ------------------------------------------------------------------------------------------------------------


def meta_order(weight, heads):
    """Rows of a rotary projection as Meta's first code had them: real and imaginary parts in turn. Row by row."""
    width = len(weight) // heads
    rows = [
        head * width + half * width // 2 + pair
        for head in range(heads)
        for pair in range(width // 2)
        for half in (0, 1)
    ]
    return weight[rows]


HEADS = {"attn_q": 4, "attn_k": 2}
PLACES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


@pytest.mark.parametrize("to", ["gguf", "gguf-fp16"])
def test_every_tensor(quantized_pycoder, exported, to):
    tensors, _ = opened(exported(to))
    model = awq_core.load(quantized_pycoder, fake_quant=True, dtype="float32")
    expected = {"token_embd.weight": ("BF16", model.get_input_embeddings().weight)}
    expected["output_norm.weight"] = ("F32", model.model.norm.weight)
    for layer in range(6):
        for ours, theirs in PLACES.items():
            weight = model.get_submodule(f"model.layers.{layer}.{ours}").weight
            kind = "F32" if "norm" in ours else "Q4_1" if to == "gguf" else "F16"
            weight = meta_order(weight, HEADS[theirs]) if theirs in HEADS else weight
            expected[f"blk.{layer}.{theirs}.weight"] = (kind, weight)
    assert set(tensors) == set(expected)
    for name, (kind, weight) in expected.items():
        assert tensors[name][0] == kind, name
        found = torch.from_numpy(np.array(tensors[name][1], dtype=np.float32))
        assert found.shape == weight.shape
        if kind in ("BF16", "F32"):
            assert torch.equal(found, weight), name
        else:  # float16 rounds to a part in 2**11: a weight, or the minimum of a block, which is 15 steps at most
            torch.testing.assert_close(found, weight.data, rtol=0, atol=float(weight.abs().max()) * 2**-10)


def test_metadata_and_tokenizer(quantized_pycoder, exported):
    _, fields = opened(exported("gguf"))
    config = json.loads((quantized_pycoder / "config.json").read_text())
    told = {
        "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
        "context_length": "max_position_embeddings", "attention.key_length": "head_dim", "vocab_size": "vocab_size",
    }  # fmt: skip
    assert fields["general.architecture"] == "llama"
    assert {name: fields[f"llama.{name}"] for name in told} == {name: config[key] for name, key in told.items()}
    assert fields["llama.rope.freq_base"] == 10000
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)

    tokenizer = AutoTokenizer.from_pretrained(quantized_pycoder)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(4096))
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    data = json.loads((quantized_pycoder / "tokenizer.json").read_text())
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in data["model"]["merges"]]
    assert fields["tokenizer.ggml.token_type"] == [3] + [1] * 4095
    assert fields["tokenizer.ggml.eos_token_id"] == 0 and not fields["tokenizer.ggml.add_bos_token"]


def test_the_folder(quantized_pycoder, exported):
    made = exported("gguf")
    assert {path.name for path in made.iterdir()} == {"model.gguf", "config.json", "README.md"}
    card = (made / "README.md").read_text()
    assert "Q4_1" in card and "of a step" in card
    # Five bits a weight in place of 4.6 for groups of 32.
    assert (made / "model.gguf").stat().st_size < 1.15 * (quantized_pycoder / "model.safetensors").stat().st_size


def test_groups_that_are_no_blocks_are_multiplied_out(tmp_path, llama_config):
    folder = quantized(llama_config(vocab_size=4096, hidden_size=48, intermediate_size=80), tmp_path, group_size=-1)
    tensors, _ = opened(export_checkpoint(folder, tmp_path / "x", "gguf").out)
    kind, found = tensors["blk.1.ffn_down.weight"]
    assert kind == "F16"
    weight = awq_core.load(folder, fake_quant=True, dtype="float16").model.layers[1].mlp.down_proj.weight
    assert np.array_equal(found, weight.detach().float().numpy())


def test_another_layout_makes_the_same_file(quantized_pycoder, exported, tmp_path):
    other = export_checkpoint(quantized_pycoder, tmp_path / "gptq", "gptq_v2").out
    ours, theirs = (
        {one.name: one.data.tobytes() for one in gguf.GGUFReader(folder / "model.gguf").tensors}
        for folder in (exported("gguf"), export_checkpoint(other, tmp_path / "x", "gguf").out)
    )
    assert ours == theirs


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Qwen 2 mixture of four experts and a shared one. Never change it."""
    return quantized(tiny_config("qwen2_moe"), tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("to", ["gguf", "gguf-fp16"])
def test_experts_are_stacked(mixture, tmp_path, to):
    tensors, fields = opened(export_checkpoint(mixture, tmp_path / "x", to).out)
    mlp = awq_core.load(mixture, fake_quant=True, dtype="float32").model.layers[1].mlp
    for place, name in (("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
        for target, weights in (
            (f"blk.1.{place}_exps.weight", torch.stack([getattr(mlp.experts, str(e))[name].weight for e in range(4)])),
            (f"blk.1.{place}_shexp.weight", getattr(mlp.shared_expert, name).weight),
        ):
            kind, found = tensors[target]
            assert kind == ("Q4_1" if to == "gguf" else "F16") and found.shape == weights.shape
            found = torch.from_numpy(np.array(found, dtype=np.float32))
            torch.testing.assert_close(found, weights.data, rtol=0, atol=float(weights.abs().max()) * 2**-10)
    for target, weight in (
        ("blk.1.ffn_gate_inp.weight", mlp.gate.weight),
        ("blk.1.ffn_gate_inp_shexp.weight", mlp.shared_expert_gate.weight[0]),
    ):
        assert tensors[target][0] == "F32" and np.array_equal(tensors[target][1], weight.detach().numpy())
    told = {
        "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64,
        "expert_shared_feed_forward_length": 128,
    }  # fmt: skip
    assert {name: fields[f"qwen2moe.{name}"] for name in told} == told


def test_what_chooses_experts_is_exact(tmp_path):
    """ERNIE stores the bias of the choice as a matrix of one row, in the model's dtype, which llama.cpp cannot add."""
    folder = quantized(tiny_config("ernie4_5_moe"), tmp_path, dtype=torch.bfloat16)
    tensors, _ = opened(export_checkpoint(folder, tmp_path / "x", "gguf").out)
    for target, shape in (("exp_probs_b.bias", (4,)), ("ffn_gate_inp.weight", (4, 64))):
        assert tensors[f"blk.1.{target}"][0] == "F32" and tensors[f"blk.1.{target}"][1].shape == shape
    assert tensors["output_norm.weight"][0] == "F32" and tensors["token_embd.weight"][0] == "BF16"


def test_a_matrix_that_lies_on_its_side(tmp_path):
    """GPT-2 stores its linears with the inputs first; those that are not quantized too."""
    folder = quantized(tiny_config("gpt2"), tmp_path, modules_to_not_convert=("mlp",))
    tensors, _ = opened(export_checkpoint(folder, tmp_path / "x", "gguf").out)
    block = awq_core.load(folder, fake_quant=True, dtype="float32").transformer.h[1]
    for target, linear, shape in (("ffn_up", block.mlp.c_fc, (96, 64)), ("ffn_down", block.mlp.c_proj, (64, 96))):
        kind, found = tensors[f"blk.1.{target}.weight"]
        assert kind == "F32" and found.shape == shape
        hidden = torch.randn(3, found.shape[1])
        expected = hidden @ torch.from_numpy(np.array(found)).T + linear.bias
        torch.testing.assert_close(linear(hidden), expected, rtol=0, atol=1e-5)
    assert tensors["blk.1.attn_qkv.weight"][0] == "Q4_1"


def test_windows(tmp_path):
    """Where llama.cpp has them, they are told; elsewhere the context is no longer."""
    _, fields = opened(
        export_checkpoint(quantized(tiny_config("gemma3_text"), tmp_path / "a"), tmp_path / "x", "gguf").out
    )
    told = {
        "attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False], "context_length": 256,
        "rope.freq_base": 1000, "rope.freq_base_swa": 10000, "rope.scaling.type": "linear", "rope.scaling.factor": 4,
    }  # fmt: skip
    assert {name: fields[f"gemma3.{name}"] for name in told} == told
    _, fields = opened(export_checkpoint(quantized(tiny_config("mistral"), tmp_path / "b"), tmp_path / "y", "gguf").out)
    assert fields["llama.context_length"] == 128 and "llama.attention.sliding_window" not in fields


def test_refusals(tmp_path, llama_config, tiny_options, quantized_llama, monkeypatch, one_line):
    from transformers import OPTConfig

    def refusal(folder, kind=CheckpointError):
        with pytest.raises(kind) as caught:
            export_checkpoint(folder, tmp_path / "x", "gguf")
        assert not (tmp_path / "x").exists()
        return caught.value

    one_line(refusal(quantized_llama), "WordLevel")
    options = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 4096}
    one_line(refusal(quantized(OPTConfig(**options, word_embed_proj_dim=64), tmp_path / "opt")), "opt", "scaled-fp16")
    other = llama_config(vocab_size=4096, num_hidden_layers=1, hidden_act="gelu")
    one_line(refusal(quantized(other, tmp_path / "gelu")), "gelu")
    # What llama.cpp has built in, and this model has otherwise.
    one_line(refusal(quantized(tiny_config("qwen3_moe", norm_topk_prob=False), tmp_path / "sum")), "norm_topk_prob")
    one_line(refusal(quantized(tiny_config("gemma2", query_pre_attn_scalar=7), tmp_path / "scale")), "32", "7")
    one_line(refusal(quantized(tiny_config("qwen2", **HALF), tmp_path / "half")), "part of each")
    folder = quantized(tiny_config("olmoe"), tmp_path / "some", modules_to_not_convert=("layers.1.mlp.experts.2",))
    one_line(refusal(folder), "blk.1.ffn_", "some experts")
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    other = llama_config(vocab_size=4096, num_hidden_layers=1, rope_parameters=rope)
    one_line(refusal(quantized(other, tmp_path / "rope")), "dynamic")

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else found(name, *rest))
    one_line(refusal(quantized_llama, ConfigError), "awq-core[gguf]")


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_rows_change_places_and_back():
    weight = torch.arange(48)
    assert torch.equal(weight[paired_rows(3, 48)], meta_order(weight, 3))


def test_joined_rows_are_taken_apart():
    """Six query heads of width 2, three for each of two key heads."""
    names = [
        f"{part}{i}"
        for g in (0, 1)
        for part in (f"q{3 * g}", f"q{3 * g + 1}", f"q{3 * g + 2}", f"k{g}", f"v{g}")
        for i in "ab"
    ]
    found = [names[row] for row in grouped_rows(6, 2, 20)]
    assert found == [f"q{head}{i}" for head in range(6) for i in "ab"] + [
        "k0a",
        "k0b",
        "k1a",
        "k1b",
        "v0a",
        "v0b",
        "v1a",
        "v1b",
    ]


def test_rope_factors_are_transformers(llama_config):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = llama_config(head_dim=128, rope_parameters=rope, max_position_embeddings=131072)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(rope_divisors(config)["rope.freqs"], plain / scaled, rtol=1e-4, atol=1e-4)
    assert not rope_divisors(llama_config())
