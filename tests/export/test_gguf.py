"""GGUF: read back by the `gguf` package, which shares no code with the writer here but the file's layout; and run in
llama.cpp where llama-cpp-python is installed."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import awq_core
from awq_core.checkpoint.pack import dequantize, pack_linear
from awq_core.errors import CheckpointError, ConfigError, NumericsError
from awq_core.export.formats import export_checkpoint
from awq_core.export.gguf_architectures import KNOWN
from awq_core.export.gguf_blocks import Fidelity, q4_1
from awq_core.export.gguf_rope import rope_divisors
from awq_core.export.gguf_tensors import grouped_rows, paired_rows
from awq_core.export.gguf_tokenizer import leading_space, pre, scores

gguf = pytest.importorskip("gguf")
ROOT = Path(__file__).parents[2]
TEXTS = ("def read_json(path):\n", "import os\nclass  Foo:\n    '''x's   12345 é 日本 '''\n\n\n\treturn", " ", "WE'RE")
ROPE3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
# What a tiny model of an architecture has more than the others, so that what is special about it shows.
SPECIAL = {
    "llama": {"attention_bias": True, "rope_parameters": ROPE3},
    "mistral": {"head_dim": 32, "sliding_window": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 32},
    "qwen2_moe": {**MOE, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**MOE, "moe_intermediate_size": 64, "head_dim": 32, "norm_topk_prob": True},
    "olmo": {"clip_qkv": 0.5},
    "olmo3": {**WINDOW, "rope_parameters": {**BASES, "full_attention": BASES["sliding_attention"]}},
    "olmoe": {**MOE, "num_key_value_heads": 4},
    "gemma": {"head_dim": 32},
    "gemma2": {**WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gemma3_text": {**WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": BASES},
    "granite": MULTIPLIERS,
    "granitemoe": {**MULTIPLIERS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": {**HALF, "head_dim": 16},
    "glm4_moe": {**HALF, "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                 "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "use_qk_norm": True},
    "deepseek_v2": {**LATENT, "topk_method": "greedy", "routed_scaling_factor": 1.5},
    "deepseek_v3": {**LATENT, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "ernie4_5": {"head_dim": 32},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2,
                     "moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    "ministral": {"head_dim": 32},
    "phi": HALF,
    "phi3": {**HALF, "pad_token_id": 0},
    "stablelm": {**HALF, "use_qkv_bias": True},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**WINDOW, "logit_scale": 0.5, "head_dim": 16},
    "glm4": {**HALF, "head_dim": 32},
    "gpt2": {"num_key_value_heads": 4, "n_inner": 96},
    "gpt_bigcode": {"n_inner": 96},
    "gpt_neox": {**HALF, "num_key_value_heads": 4, "use_parallel_residual": True},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "nemotron": {**HALF, "head_dim": 16},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "smollm3": {"num_hidden_layers": 4, "pad_token_id": 0},
}  # fmt: skip


def tiny_config(name, **more):
    """A tiny model's configuration, of a model type."""
    from transformers import AutoConfig

    from awq_core.testing import TINY_DECODER

    options = {**TINY_DECODER, "vocab_size": 4096, "max_position_embeddings": 256, **SPECIAL.get(name, {}), **more}
    return AutoConfig.for_model(name, **options)


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


def opened(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    return (
        {one.name: (one.tensor_type.name, gguf.quants.dequantize(one.data, one.tensor_type)) for one in reader.tensors},
        {name: field.contents() for name, field in reader.fields.items()},
    )


@pytest.fixture(scope="module")
def exported(quantized_pycoder, tmp_path_factory):
    """exported("gguf"): the folder of that export. Never change it."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def export(to):
        if to not in made:
            made[to] = export_checkpoint(quantized_pycoder, folder / to, to).out
        return made[to]

    return export


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


def quantized(config, folder, group_size=32, **more):
    """A tiny model with the demo model's tokenizer."""
    from awq_core.testing import save_tiny

    save_tiny(config, folder / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).write_bytes((ROOT / "examples" / "pycoder" / name).read_bytes())
    settings = awq_core.QuantConfig(group_size=group_size, scale=False, clip="none", **more)
    awq_core.quantize(folder / "source", folder / "DIR", config=settings)
    return folder / "DIR"


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


# -- tokenizers -------------------------------------------------------------------------------------------------------


def bytes_after(*patterns, normalizer=None, **model):
    steps = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not patterns})
    return {"normalizer": normalizer, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "model": model}


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_names_of_patterns(one_line):
    assert pre(bytes_after()) == "gpt-2"
    assert pre(bytes_after(LLAMA3, ignore_merges=True)) == "llama-bpe"
    assert pre(bytes_after(LLAMA3)) == "smaug-bpe"
    assert pre(bytes_after(LLAMA3.replace("{1,3}", ""), normalizer={"type": "NFC"})) == "qwen2"
    for other in (bytes_after("."), bytes_after(normalizer={"type": "Lowercase"})):
        with pytest.raises(CheckpointError) as caught:
            pre(other)
        one_line(caught.value, "tokenizer")


def test_scores_are_ranks():
    assert scores(["a", "b", "ab", "abb"], [["a", "b"], "ab b"]) == [-2, -2, 0, -1]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    assert leading_space({"pre_tokenizer": space})
    assert not leading_space({"pre_tokenizer": {**space, "prepend_scheme": "never"}})
    assert leading_space({"normalizer": {"type": "Prepend", "prepend": "\u2581"}})


def sentencepiece_like(folder):
    """A tokenizer with byte fallback and every merge, as transformers makes it of sentencepiece's BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    texts = (ROOT / "README.md").read_text().splitlines()
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=first, show_progress=False))
    vocab = trained.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in vocab and p[i:] in vocab]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = "\u2581"
    made.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(token, normalized=False) for token in first[:3]])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )
    tokens.save_pretrained(folder)
    return tokens


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory, llama_config):
    folder = tmp_path_factory.mktemp("pieces")
    made = quantized(llama_config(vocab_size=720, num_hidden_layers=1), folder)
    sentencepiece_like(made)
    return made


def test_a_tokenizer_of_pieces(sentencepiece_folder, tmp_path):
    _, fields = opened(export_checkpoint(sentencepiece_folder, tmp_path / "x", "gguf").out)
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert kinds[:4] == [2, 3, 3, 6] and kinds[258:261] == [6, 1, 1] and set(kinds[700:]) == {5}
    assert len(fields["tokenizer.ggml.tokens"]) == 720
    found = fields["tokenizer.ggml.scores"]
    assert max(found[300:]) <= 0 and found[650] > found[699]


# -- llama.cpp --------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(monkeypatch):
    """llama("DIR", vocab_only=True): the file in llama.cpp, without its layouts for AMX, which crash in places."""
    module = pytest.importorskip("llama_cpp")
    defaults = module.llama_cpp.llama_model_default_params

    def plain():
        params = defaults()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(module.llama_cpp, "llama_model_default_params", plain)
    options = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    return lambda folder, **more: module.Llama(str(folder / "model.gguf"), **options, **more)


def expected_tokens(model, ids, new):
    found, fresh, past = [], ids, None
    with torch.no_grad():
        for _ in range(new):
            step = model(torch.tensor([fresh]), past_key_values=past, use_cache=True)
            fresh, past = [int(step.logits[0, -1].argmax())], step.past_key_values
            found += fresh
    return found


def run(model, ids, new=0):
    """Logits `[tokens, vocabulary]`, and greedy tokens."""
    model.reset()
    model.eval(ids)
    logits, found = np.array(model.scores[: len(ids)]), []
    for _ in range(new):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval([found[-1]])
    return torch.from_numpy(logits), found


def test_llama_cpp_writes_the_same(quantized_pycoder, exported, llama):
    tokenizer, ours = (
        AutoTokenizer.from_pretrained(quantized_pycoder),
        awq_core.load(quantized_pycoder, dtype="float32"),
    )
    theirs = llama(exported("gguf-fp16"))
    ids = tokenizer(TEXTS[0]).input_ids
    logits, tokens = run(theirs, ids, 40)
    assert tokens == expected_tokens(ours, ids, 40)
    with torch.no_grad():
        expected = ours(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 * float(expected.std()))


def unpacked(folder, rounding=False):
    """The model in float32.

    Args:
        rounding: round what quantized linears read as llama.cpp does for Q4_1: to 8 bits, with one step for 32 inputs.
    """
    model = awq_core.load(folder, dtype="float32", fake_quant=True)

    def rounded(_, args):
        blocks = args[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 127
        return (((blocks / step).round() * step).flatten(-2), *args[1:])

    for name, module in model.model.layers.named_modules():
        if rounding and isinstance(module, torch.nn.Linear) and not name.endswith("gate"):
            module.register_forward_pre_hook(rounded)
    return model


def logits_of(model, ids):
    """`[tokens, vocabulary]`"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def eight_bits(quantized_pycoder):
    """The demo model as it is, and as llama.cpp computes it."""
    pytest.importorskip("llama_cpp")
    return unpacked(quantized_pycoder), unpacked(quantized_pycoder, rounding=True)


def test_llama_cpp_with_the_codes(quantized_pycoder, exported, llama, eight_bits):
    """For Q4_1 it rounds activations to 8 bits. The error is that which the same rounding makes here."""
    ids = AutoTokenizer.from_pretrained(quantized_pycoder)(TEXTS[1]).input_ids
    logits, _ = run(llama(exported("gguf")), ids)
    exact, rounding = (logits_of(model, ids) for model in eight_bits)
    error = (rounding - exact).pow(2).mean().sqrt()
    assert (logits - exact).pow(2).mean().sqrt() < 1.5 * error
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9


PROMPTS = (
    *TEXTS[:2], "import os\nimport sys\n", "class Stack:\n    def __init__(self", "for line in open(path):\n",
    "if __name__ == ", "    try:\n        value = int(text)\n    except ", "def add(a, b):\n    return", "# Copyright",
    "with open(name, 'w') as file:\n    ",
)  # fmt: skip


def test_llama_cpp_writes_the_same_from_the_codes(quantized_pycoder, exported, llama, eight_bits):
    """Greedy text is the torch model's, most of it to the end; where it turns, the two tokens were nearer than what
    rounding to 8 bits moves the difference of two logits by."""
    tokenizer, theirs = AutoTokenizer.from_pretrained(quantized_pycoder), llama(exported("gguf"))
    exact, rounding = eight_bits
    same = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        expected, (_, found) = expected_tokens(exact, ids, 32), run(theirs, ids, 32)
        same += found == expected
        if found != expected:
            turn = next(place for place in range(32) if found[place] != expected[place])
            before, after = (logits_of(model, ids + expected[:turn])[-1] for model in (exact, rounding))
            error = float((after - before).pow(2).mean().sqrt())
            gap = float(before[expected[turn]] - before[found[turn]])
            assert gap < 3 * 2**0.5 * error, (prompt, turn, gap, error)
    assert same > len(PROMPTS) / 2


def test_llama_cpp_with_a_quantized_head(tmp_path, llama_config, llama):
    """Of a model whose head was tied: the file has both."""
    from awq_core.testing import save_tiny

    save_tiny(llama_config(vocab_size=4096, tie_word_embeddings=True), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "source" / name).write_bytes((ROOT / "examples" / "pycoder" / name).read_bytes())
    settings = awq_core.QuantConfig(group_size=32, scale=False, clip="none", lm_head=True)
    awq_core.quantize(tmp_path / "source", tmp_path / "DIR", config=settings)
    made = export_checkpoint(tmp_path / "DIR", tmp_path / "x", "gguf-fp16").out
    assert {"token_embd.weight", "output.weight"} <= set(opened(made)[0])
    ids = list(range(100, 120))
    logits, _ = run(llama(made), ids)
    with torch.no_grad():
        expected = awq_core.load(tmp_path / "DIR", dtype="float32")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03 * float(expected.std()))


def test_llama_cpp_cuts_text_the_same(quantized_pycoder, exported, sentencepiece_folder, llama, tmp_path):
    pieces = export_checkpoint(sentencepiece_folder, tmp_path / "x", "gguf").out
    for folder, made in ((quantized_pycoder, exported("gguf")), (sentencepiece_folder, pieces)):
        tokenizer, theirs = AutoTokenizer.from_pretrained(folder), llama(made, vocab_only=True)
        for text in TEXTS:
            assert theirs.tokenize(text.encode(), special=True) == tokenizer(text).input_ids, text


OLD = {"original_max_position_embeddings": 16, "rope_theta": 10000.0}
YARN = {**OLD, "rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5, "beta_fast": 4.0}
LATENT_YARN = {**YARN, "attention_factor": None}
LONG = {**OLD, "rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [1.0, 3.0, 5.0, 9.0],
        "partial_rotary_factor": 0.5}  # fmt: skip
SHORT = {**LONG, "original_max_position_embeddings": 256}
# Other forms of an architecture, beside its tiny model.
FORMS = {
    "deepseek_v2, yarn": ("deepseek_v2", {"rope_parameters": {**LATENT_YARN, "mscale": 0.7, "mscale_all_dim": 0.7}}),
    "deepseek_v3, yarn": ("deepseek_v3", {"rope_parameters": {**LATENT_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek_v2, one query": ("deepseek_v2", {"q_lora_rank": None}),
    "falcon, one key head": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "glm4_moe, no norms of heads": ("glm4_moe", {"use_qk_norm": False}),
    "gpt_neox, one after another": ("gpt_neox", {"use_parallel_residual": False}),
    "llama, linear": ("llama", {"rope_parameters": BASES["full_attention"]}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
    "olmo3, yarn": ("olmo3", {"rope_parameters": {**BASES, "full_attention": YARN}}),
    "phi3, long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}),
    "phi3, short": (
        "phi3",
        {"rope_parameters": SHORT, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "qwen2, yarn": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": None}}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True}),
}


@pytest.mark.parametrize("form", [*sorted(KNOWN), *FORMS])
def test_llama_cpp_knows_the_architecture(form, llama, tmp_path):
    name, more = FORMS.get(form, (form, {}))
    folder = quantized(tiny_config(name, **more), tmp_path)
    ids = torch.randint(0, 4096, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    logits, _ = run(llama(export_checkpoint(folder, tmp_path / "x", "gguf-fp16").out), ids)
    with torch.no_grad():
        expected = awq_core.load(folder, dtype="float32")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.03 * float(expected.std()))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_llama_cpp_with_the_codes_of_experts(name, llama, tmp_path):
    folder = quantized(tiny_config(name), tmp_path)
    ids = list(range(100, 120))
    logits, _ = run(llama(export_checkpoint(folder, tmp_path / "x", "gguf").out), ids)
    exact, rounding = (logits_of(unpacked(folder, rounding), ids) for rounding in (False, True))
    error = (rounding - exact).pow(2).mean().sqrt()
    assert (logits - exact).pow(2).mean().sqrt() < 1.5 * error < 0.1 * exact.std()
