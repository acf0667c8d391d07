"""What quantize writes, held to what vLLM's AWQ loader reads: a frozen contract.

vLLM's rules are stated anew here and share no code with the package. They are those of its `AWQConfig`, of
`AWQMarlinConfig`, which takes an AWQ checkpoint over on most GPUs, and of `AutoAWQConfig`, which followed both
(vllm/model_executor/layers/quantization: awq.py, awq_marlin.py, auto_awq.py; utils/quant_utils.py: is_layer_skipped).
`python benchmarks/engines.py --engine vllm` runs vLLM itself; version 0.32.0 keeps these rules:

- keys: w_bit or bits, q_group_size or group_size, zero_point; lm_head; modules_to_not_convert, looked for anywhere in a
  full name; Marlin knows bits, group_size and quant_method "awq" by these names alone
- a linear [out, in]: qweight int32 [in, out/8], qzeros int32 [in/group, out/8], scales [in/group, out]
- nibbles of a word, from the lowest: columns 0 2 4 6 1 3 5 7
- q/k/v and gate/up are one linear, whose parts are all quantized or none, and lie side by side along out
- experts of a layer are one stack, quantized or not as a whole, and never in whole rows
- a router may be a linear like any other (Qwen3-MoE's is): it has to be named among what is not converted
- entries are renamed as tensors are, by prefixes that end in a dot, and then looked for in vLLM's own names
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig, Qwen3VLConfig

import awq_core
from awq_core import QuantConfig
from awq_core.checkpoint.pack import pack
from awq_core.testing import save_tiny

REVERSE_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # vLLM's, from nibbles to columns
MAPPING = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FLOATS = {torch.float16, torch.bfloat16, torch.float32}


# -- vLLM's reading rules


class Settings:
    """AWQConfig.from_config and AWQMarlinConfig.from_config, which must agree."""

    def __init__(self, section):
        def first(*keys):
            return next(section[key] for key in keys if key in section)  # a key that none has: StopIteration

        self.bits = first("w_bit", "bits")
        self.group_size = first("q_group_size", "group_size")
        self.zero_point = first("zero_point")
        self.lm_head = section.get("lm_head", False)
        self.not_converted = section.get("modules_to_not_convert") or []
        assert self.bits == 4
        marlin = (section["quant_method"].lower(), section["bits"], section["group_size"], section["zero_point"])
        assert marlin == ("awq", self.bits, self.group_size, self.zero_point)
        assert self.zero_point is True and self.group_size in (-1, 32, 64, 128)  # that Marlin has with zero points

    def derive(self, tensors):
        """maybe_update_config: where nothing is named, what holds no integers is not converted."""
        if not self.not_converted:
            layers = {name.rpartition(".")[0] for name in tensors}
            packed = {name.rpartition(".")[0] for name, tensor in tensors.items() if tensor.dtype not in FLOATS}
            self.not_converted = sorted(layers - packed)

    def skips(self, prefix):
        """is_layer_skipped(skip_with_substr=True) of a layer by its name in vLLM, fused."""
        parent, _, name = prefix.rpartition(".")
        if name in MAPPING and any(one in prefix for one in self.not_converted):
            return True  # the fused linear goes by its own name
        parts = [f"{parent}.{part}" for part in MAPPING.get(name, [name])] if parent else [prefix]
        skipped = {any(one in part for one in self.not_converted) for part in parts}
        assert len(skipped) == 1, f"some but not all shards of {prefix} are quantized"
        return skipped.pop()

    def groups(self, in_features):
        size = in_features if self.group_size == -1 else self.group_size
        assert in_features % size == 0
        return in_features // size


class Loader:
    """The tensors of a checkpoint, each of which has to be taken exactly once."""

    def __init__(self, folder):
        self.tensors = {}
        for path in folder.glob("*.safetensors"):
            self.tensors |= load_file(path)
        self.config = json.loads((folder / "config.json").read_text())
        self.settings = Settings(self.config["quantization_config"])
        self.left = set(self.tensors)
        self.settings.derive(self.tensors)

    def take(self, name, shape, *dtypes):
        self.left.remove(name)
        tensor = self.tensors[name]
        assert tuple(tensor.shape) == shape, name
        assert tensor.dtype in dtypes, name
        return tensor

    def linear(self, prefix, in_features, outs, *, quantized=None):
        """A linear, fused of the parts `outs` (name -> out), as float32 [out, in]."""
        parent = prefix.rpartition(".")[0]
        names = [f"{parent}.{part}" if parent else part for part in outs]
        if self.settings.skips(prefix) if quantized is None else not quantized:
            return torch.cat(
                [
                    self.take(f"{n}.weight", (out, in_features), *FLOATS).float()
                    for n, out in zip(names, outs.values(), strict=True)
                ]
            )
        assert sum(outs.values()) % 8 == 0 and all(out % 8 == 0 for out in outs.values())
        groups = self.settings.groups(in_features)
        merged = []
        for part, dtypes in (("qweight", {torch.int32}), ("qzeros", {torch.int32}), ("scales", FLOATS)):
            rows, pack_factor = (in_features if part == "qweight" else groups), (1 if part == "scales" else 8)
            pieces = (
                self.take(f"{n}.{part}", (rows, o // pack_factor), *dtypes)
                for n, o in zip(names, outs.values(), strict=True)
            )
            merged.append(torch.cat(list(pieces), dim=1))
        return dequantized(*merged)

    def experts(self, prefix, count, hidden, inner, names):
        """A stack: RoutedExperts asks for its whole name once."""
        quantized = not any(one in prefix for one in self.settings.not_converted)
        assert not quantized or self.settings.group_size > 0, "AutoAWQMoEMethod divides by the group size"
        gate, down, up = names
        for e in range(count):
            for name, in_features, out in ((gate, hidden, inner), (up, hidden, inner), (down, inner, hidden)):
                yield (
                    f"{prefix}.{e}.{name}",
                    self.linear(f"{prefix}.{e}.{name}", in_features, {name: out}, quantized=quantized),
                )

    def plain(self, name, *shape):
        self.take(name, shape, *FLOATS)


def unpacked(words):
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 15)[:, :, REVERSE_ORDER].flatten(1)


def dequantized(qweight, qzeros, scales):
    """awq_dequantize, transposed."""
    repeat = len(qweight) // len(qzeros)
    zeros, steps = (one.repeat_interleave(repeat, dim=0) for one in (unpacked(qzeros), scales.float()))
    return ((unpacked(qweight) - zeros) * steps).T


def decoder(loader, *, experts=None, bias=False, norms=()):
    """A decoder as vLLM builds it from config.json; returns name in transformers -> weight [out, in] of every linear.

    `experts`: (name of the mixture in a layer, of gate, down and up).
    """
    c, found = loader.config, {}
    hidden = c["hidden_size"]
    head = c.get("head_dim") or hidden // c["num_attention_heads"]
    q, kv = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    loader.plain("model.embed_tokens.weight", c["vocab_size"], hidden)
    loader.plain("model.norm.weight", hidden)

    def linear(parent, name, in_features, **outs):
        weight = loader.linear(f"{parent}.{name}", in_features, outs)
        found.update(zip([f"{parent}.{part}" for part in outs], weight.split(list(outs.values())), strict=True))

    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            loader.plain(f"{layer}.{norm}.weight", hidden)
        for norm in norms:
            loader.plain(f"{layer}.self_attn.{norm}.weight", head)
        linear(f"{layer}.self_attn", "qkv_proj", hidden, q_proj=q, k_proj=kv, v_proj=kv)
        linear(f"{layer}.self_attn", "o_proj", q, o_proj=hidden)
        if bias:
            for part, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
                loader.plain(f"{layer}.self_attn.{part}.bias", out)
        if experts is None:
            inner = c["intermediate_size"]
            linear(f"{layer}.mlp", "gate_up_proj", hidden, gate_proj=inner, up_proj=inner)
            linear(f"{layer}.mlp", "down_proj", inner, down_proj=hidden)
            continue
        mixture, *names = experts
        count = c.get("num_local_experts") or c["num_experts"]
        inner = c.get("moe_intermediate_size") or c["intermediate_size"]
        assert loader.settings.skips(f"{layer}.{mixture}.gate"), "a router that is not named would be quantized"
        loader.plain(f"{layer}.{mixture}.gate.weight", count, hidden)
        found.update(loader.experts(f"{layer}.{mixture}.experts", count, hidden, inner, names))
    if loader.settings.lm_head:
        assert not c["tie_word_embeddings"]
        found["lm_head"] = loader.linear("lm_head", hidden, {"lm_head": c["vocab_size"]})
    elif not c["tie_word_embeddings"]:
        loader.plain("lm_head.weight", c["vocab_size"], hidden)
    assert not loader.left, f"vLLM has no place for {sorted(loader.left)[:4]}"
    return found


# -- what this project writes


def quantized(config, tmp_path, dtype=torch.float32, **settings):
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config, source, dtype=dtype)
    config = QuantConfig(**{"group_size": 32, "scale": False, "clip": "none", **settings})
    result = awq_core.quantize(source, out, config=config)
    return out, {linear.name for linear in result.plan.linears if linear.quantize}


def check_weights(found, folder):
    """Every linear that vLLM reads has the weight that this project reads."""
    ours = {name: p.float() for name, p in awq_core.load(folder, fake_quant=True, dtype="float32").named_parameters()}
    compared = [name for name in found if f"{name}.weight" in ours]
    for name in compared:
        assert torch.equal(found[name], ours[f"{name}.weight"]), name
    return compared


CASES = {
    "plain": {},
    "whole rows": {"group_size": -1},
    "groups of 64, where they fit": {"group_size": 64},
    "a layer kept, of more than ten": {"layers": 12, "modules_to_not_convert": ("layers.1.",)},
    "q kept, so k and v": {"modules_to_not_convert": ("layers.0.self_attn.q_proj",)},
    "up kept, so gate": {"modules_to_not_convert": ("up_proj",)},
    "the head too": {"lm_head": True},
    "a tied head": {"lm_head": True, "tie": True},
    "biases": {"bias": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_reads_a_decoder(case, tmp_path, tiny_options):
    case = dict(CASES[case])
    bias, dtype = case.pop("bias", False), case.pop("dtype", torch.float32)
    options = {
        **tiny_options,
        "num_hidden_layers": case.pop("layers", 2),
        "tie_word_embeddings": case.pop("tie", False),
    }
    folder, names = quantized(LlamaConfig(**options, attention_bias=bias), tmp_path, dtype, **case)
    loader = Loader(folder)
    found = decoder(loader, bias=bias)
    assert len(check_weights(found, folder)) == len(found)
    read = {name.removesuffix(".qweight") for name in loader.tensors if name.endswith(".qweight")}
    assert read == names and names, "packed on disk and planned are the same"
    keys = {"quant_method", "bits", "group_size", "zero_point", "version", "modules_to_not_convert", "lm_head"}
    section = loader.config["quantization_config"]
    assert section.keys() <= keys and section["version"] == "gemm"
    step = torch.bfloat16 if dtype is torch.bfloat16 else torch.float16
    assert {loader.tensors[f"{name}.scales"].dtype for name in read} == {step}


def test_vllm_reads_stacks_of_experts(tmp_path, tiny_options):
    folder, names = quantized(MixtralConfig(**tiny_options, num_local_experts=3), tmp_path)
    found = decoder(Loader(folder), experts=("block_sparse_moe", "w1", "w2", "w3"))
    assert len([name for name in found if ".experts." in name]) == 2 * 3 * 3
    assert len(names) == 2 * (4 + 9) and len(check_weights(found, folder)) >= 8  # attention has one name in both


def test_vllm_reads_experts_with_the_names_of_an_mlp(tmp_path, tiny_options):
    """A router named gate beside experts with a gate_proj: its prefix must not be found in theirs."""
    options = {**tiny_options, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    folder, names = quantized(Qwen3MoeConfig(**options), tmp_path)
    found = decoder(Loader(folder), experts=("mlp", "gate_proj", "down_proj", "up_proj"), norms=("q_norm", "k_norm"))
    assert len(names) == 2 * (4 + 12)
    for name in names:
        weight = found[name]
        assert weight.unique(dim=0).shape[0] > 1, f"{name} is read as something"


def test_a_router_that_is_not_named_is_an_error(tmp_path, tiny_options):
    options = {**tiny_options, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    folder, _ = quantized(Qwen3MoeConfig(**options), tmp_path)
    loader = Loader(folder)
    assert {f"model.layers.{i}.mlp.gate" for i in range(2)} <= set(loader.settings.not_converted)
    loader.settings.not_converted = ["lm_head"]
    with pytest.raises(AssertionError, match="router"):
        decoder(loader, experts=("mlp", "gate_proj", "down_proj", "up_proj"), norms=("q_norm", "k_norm"))


def test_experts_in_whole_rows_are_not_read(tmp_path, tiny_options):
    folder, _ = quantized(MixtralConfig(**tiny_options, num_local_experts=3), tmp_path, group_size=-1)
    with pytest.raises(AssertionError, match="group size"):
        decoder(Loader(folder), experts=("block_sparse_moe", "w1", "w2", "w3"))


def test_a_tower_is_kept_by_the_name_that_vllm_gives_it(tmp_path, tiny_options):
    """Qwen3-VL: "model.visual." becomes "visual." in vLLM, and "model.visual" stays as it is."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3VLConfig(
        text_config={**tiny_options, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        vision_config={**vision, "patch_size": 4, "deepstack_visual_indexes": [0]},
    )
    folder, _ = quantized(config, tmp_path)
    loader = Loader(folder)
    prefixes = {"model.visual.": "visual.", "lm_head.": "language_model.lm_head.", "model.language_model.": "text."}

    def renamed(name):
        for old, new in prefixes.items():
            name = name.replace(old, new, 1) if name.startswith(old) else name
        return name

    loader.settings.not_converted = [renamed(one) for one in loader.settings.not_converted]
    kept = [name for name in loader.tensors if name.startswith("model.visual.") and name.endswith(".weight")]
    assert kept and all(loader.settings.skips(renamed(name.removesuffix(".weight"))) for name in kept)
    packed = [name.removesuffix(".qweight") for name in loader.tensors if name.endswith(".qweight")]
    assert packed and not any(loader.settings.skips(renamed(name)) for name in packed)


@pytest.mark.parametrize(
    ("kept", "entries"),
    [
        ("layers.0.self_attn.q_proj", ["q_proj", "k_proj", "v_proj", "qkv_proj"]),
        ("layers.0.mlp.up_proj", ["gate_proj", "up_proj", "gate_up_proj"]),
    ],
)
def test_a_fused_linear_that_is_kept_has_its_own_entry(kept, entries, tmp_path, tiny_options):
    """SGLang looks for entries in the name of the fused linear only."""
    folder, names = quantized(LlamaConfig(**tiny_options), tmp_path, modules_to_not_convert=(kept,))
    listed = Loader(folder).settings.not_converted
    parent = f"model.{kept.rpartition('.')[0]}"
    assert {f"{parent}.{entry}" for entry in entries} <= set(listed)
    fused = {f"{name.rpartition('.')[0]}.{entries[-1]}" for name in names if name.rpartition(".")[2] in entries}
    assert fused and not any(one in name for one in listed for name in fused), "what is quantized is not found"


def test_the_order_of_nibbles_is_frozen():
    columns = torch.arange(8).repeat(2, 1)
    assert [hex(word) for word in pack(columns).flatten().tolist()] == ["0x75316420"] * 2
    assert torch.equal(unpacked(pack(columns)), columns)


@pytest.mark.parametrize(
    "broken",
    [
        {"modules_to_not_convert": ["lm_head", "layers.0.self_attn.q_proj"]},
        {"modules_to_not_convert": ["lm_head", "o_proj"]},
        {"bits": 8},
        {"group_size": 64},
        {"quant_method": "awq_core"},
        {"zero_point": False},
    ],
)
def test_the_rules_find_what_vllm_would_not_read(quantized_llama, tmp_path, broken):
    """The restatement itself: each of these makes vLLM fail, or read other weights."""
    loader = Loader(quantized_llama)
    assert decoder(loader)
    config = json.loads((quantized_llama / "config.json").read_text())
    config["quantization_config"] |= broken
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(quantized_llama / "model.safetensors")
    with pytest.raises((AssertionError, KeyError)):
        decoder(Loader(folder))
