"""Fused models compute what unfused ones do: with padding, rope scaling, windows and every kind of cache."""

import copy
import json
import re
import threading
import types
from pathlib import Path

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    SmolLM3Config,
    StaticCache,
)

import awq_core
from awq_core import QuantConfig
from awq_core.checkpoint.pack import dequantize
from awq_core.errors import ConfigError, OutputError, PluginError
from awq_core.hooks import Architecture, FusedBlock, LayerStack, hookimpl, presets
from awq_core.hooks.manager import PluginManager
from awq_core.kernels import blocks
from awq_core.modules import NotFusedError, attention, fusing, merged, norms
from awq_core.runtime import fused
from awq_core.runtime.fused import Outcome, PackedWeights, merge, summary
from awq_core.runtime.linear import QuantLinear
from awq_core.runtime.load import load
from awq_core.testing import save_tiny

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(8, 100, (2, 13), generator=GENERATOR)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0
EXACT = {"rtol": 1e-5, "atol": 1e-5}
WINDOW = 4


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **options}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
CASES = {
    "grouped-query": (LlamaConfig, {}),
    "multi-head-biases": (LlamaConfig, {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "linear": (LlamaConfig, rope("linear")),
    "dynamic": (LlamaConfig, rope("dynamic")),  # and a shorter original length, see `folders`
    "yarn": (LlamaConfig, {"max_position_embeddings": 32, **rope("yarn", original_max_position_embeddings=8)}),
    "llama3": (LlamaConfig, rope("llama3", **LLAMA3)),
    "window": (MistralConfig, {"head_dim": 16, "sliding_window": WINDOW}),
    "qkv-biases": (Qwen2Config, {}),
    "window-in-one-layer": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "head-norms": (Qwen3Config, {"head_dim": 32}),
    "no-rope-layers": (SmolLM3Config, {"no_rope_layers": [0, 1]}),
    "mixtral": (MixtralConfig, {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "dense-beside-mixture": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [0],
        },
    ),
}
NAMES = list(CASES)
LINES = {
    "no-rope-layers": "SmolLM3Attention.forward is not the code this replaces",
    "dense-beside-mixture": "gate-up in 1 of 4 (no gate_proj)",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_options):
    """folders("yarn"): a tiny model rounded to 4 bits, made once."""
    made, root = {}, tmp_path_factory.mktemp("fused")

    def get(name):
        if name not in made:
            kind, options = CASES[name]
            save_tiny(kind(**{**tiny_options, **options}), root / name)
            config = QuantConfig(group_size=32, scale=False, clip="none", rounding="nearest")
            made[name] = awq_core.quantize(root / name, root / f"{name}-4bit", config=config).out
            if name == "dynamic":
                file = made[name] / "config.json"
                file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 8}))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("AWQ_KERNEL", "reference")


@pytest.fixture
def everywhere(monkeypatch):
    """What is for GPUs only is fused here too; the operations then run in plain torch."""
    monkeypatch.setattr(fused, "unfit", lambda needed, device: "")
    monkeypatch.setattr(fusing, "accelerated", lambda tensor: True)


@pytest.fixture(params=[False, True], ids=["products", "everything"])
def fresh_pair(request, folders):
    """fresh_pair("yarn"): the model as it is, and fused; without and with the parts for GPUs."""
    if request.param:
        request.getfixturevalue("everywhere")
    return lambda name: (load(folders(name)), load(folders(name), fuse=True))


@pytest.fixture
def pair(fresh_pair, loaded, request):
    """The same, loaded once; not to be changed. A dynamic rope has a memory, so that model is always new."""
    extent = request.node.callspec.params["fresh_pair"]

    def get(name):
        if (name, extent) not in loaded or name == "dynamic":
            loaded[name, extent] = fresh_pair(name)
        return loaded[name, extent]

    return get


@pytest.fixture(scope="module")
def loaded():
    """What `pair` has loaded."""
    return {}


def parts_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, merged.Part)]


# -- the same function ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_left_padded_batches(fresh_pair, name, capsys):
    plain, fast = fresh_pair(name)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fused qkv")
    assert "no GPU" in line or LINES.get(name, "") in line
    assert "model.layers.1.self_attn.k_proj" in parts_of(fast)
    want = plain(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(fast(input_ids=IDS, attention_mask=MASK).logits, want, **EXACT)
    alone = plain(input_ids=IDS[:1, 5:]).logits
    if name != "dynamic":  # its rope depends on the length, padding included
        torch.testing.assert_close(fast(input_ids=IDS, attention_mask=MASK).logits[:1, 5:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_token_at_a_time(pair, name, kind):
    """Against the unfused model with the same cache and, where rope does not depend on the length, with none."""
    plain, fast = pair(name)
    options = {"max_cache_len": 16} if kind is StaticCache else {}
    answers = []
    for model in (plain, fast):
        cache, mask = kind(config=model.config, **options), MASK[:, :3]
        steps = [model(input_ids=IDS[:, :3], attention_mask=mask, past_key_values=cache).logits]
        for end in range(4, IDS.shape[1] + 1):
            steps.append(
                model(input_ids=IDS[:, end - 1 : end], attention_mask=MASK[:, :end], past_key_values=cache).logits
            )
        answers.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(answers[1][1], answers[0][1], **EXACT)
    torch.testing.assert_close(answers[1][0, 5:], answers[0][0, 5:], **EXACT)
    if name != "dynamic":
        whole = plain(input_ids=IDS).logits
        torch.testing.assert_close(answers[1][1], whole[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation(pair, name, cache):
    """Far longer than the windows."""
    plain, fast = pair(name)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    got, want = (model.generate(input_ids=IDS, attention_mask=MASK, **options) for model in (fast, plain))
    assert torch.equal(got, want) and got.shape == (2, 22)


@torch.no_grad()
def test_attentions_and_hidden_states_are_still_recorded(fresh_pair):
    plain, fast = fresh_pair("grouped-query")
    for model in (plain, fast):
        model.set_attn_implementation("eager")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    got, want = (model(input_ids=IDS, **wanted) for model in (fast, plain))
    for name in ("attentions", "hidden_states"):
        assert len(got[name]) == len(want[name]) > 1
        for one, other in zip(got[name], want[name], strict=True):
            torch.testing.assert_close(one, other, **EXACT)


def test_a_gradient_reaches_adapters_below_and_beside(fresh_pair):
    """LoRA on a frozen int4 model: adapters on the embeddings' output and on one part of a merged product."""

    def gradients(model):
        below = torch.zeros(64, requires_grad=True)
        down = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        up = torch.ones(32, 4, requires_grad=True)
        beside = model.model.layers[0].self_attn.k_proj
        beside.register_forward_hook(lambda module, args, out: out + args[0] @ down.T @ up.T)
        model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + below)
        model(input_ids=IDS, attention_mask=MASK).logits[1].pow(2).mean().backward()
        return below.grad, down.grad, up.grad

    plain, fast = fresh_pair("grouped-query")
    for got, want in zip(gradients(fast), gradients(plain), strict=True):
        assert got.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own(pair):
    plain, fast = pair("grouped-query")
    twin = copy.deepcopy(fast)
    assert twin.model.layers[0].mlp.up_proj.product is twin.model.layers[0].mlp.gate_proj.product
    assert twin.model.layers[0].mlp.up_proj.product is not fast.model.layers[0].mlp.up_proj.product
    torch.testing.assert_close(twin(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)


@torch.no_grad()
def test_one_decode_step_compiles_without_a_break(pair):
    plain, fast = pair("grouped-query")
    caches = [StaticCache(config=plain.config, max_cache_len=16) for _ in range(2)]
    for model, cache in zip((plain, fast), caches, strict=True):
        model(input_ids=IDS, past_key_values=cache)
    step = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for token in (7, 8):
        ids = torch.full((2, 1), token)
        got = step(input_ids=ids, past_key_values=caches[1]).logits
        torch.testing.assert_close(got, plain(input_ids=ids, past_key_values=caches[0]).logits, **EXACT)


# -- what is fused ----------------------------------------------------------------------------------------------------


def test_products_are_merged_and_the_line_says_so(folders, capsys):
    model = load(folders("grouped-query"), fuse=True)
    assert capsys.readouterr().err.splitlines() == [
        "fused qkv, gate-up in 2 of 2 blocks; not fused: rotary, attention, norms (no GPU)"
    ]
    sizes = {name: module.out_features for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert sorted(sizes.values()) == [64, 64, 64, 64, 128, 128, 192, 192]
    assert not any(isinstance(module, PackedWeights) for module in model.modules())


def test_kernels_are_called_where_they_apply(folders, everywhere, monkeypatch, capsys):
    model = load(folders("head-norms"), fuse=True)
    assert capsys.readouterr().err.strip() == "fused qkv, rotary, attention, gate-up, norms in 2 of 2 blocks"
    calls = dict.fromkeys(("rms_norm", "rotate_and_store", "decode_attention"), 0)

    def counted(name):
        real = getattr(blocks, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    for name in ("rotate_and_store", "decode_attention"):
        monkeypatch.setattr(blocks, name, counted(name))
    monkeypatch.setattr(norms, "rms_norm", counted("rms_norm"))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    model.generate(input_ids=IDS, attention_mask=MASK, **options)
    # Two layers; the prompt fills a cache that is not allocated yet, and has more than one token.
    assert calls == {"rms_norm": 4 * 4, "rotate_and_store": 3 * 2, "decode_attention": 3 * 2}


def test_a_sliding_cache_is_left_to_transformers(folders, everywhere, monkeypatch):
    model = load(folders("window"), fuse=True)
    monkeypatch.setattr(blocks, "rotate_and_store", None)
    made = model.generate(
        input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation="static"
    )
    assert made.shape == (2, 16)


def test_attention_that_is_not_sdpa_stays(folders, everywhere, monkeypatch):
    model = load(folders("grouped-query"))
    model.set_attn_implementation("eager")
    with pytest.raises(NotFusedError, match="attention is eager, not sdpa"):
        attention.decode_attention(model.model.layers[0].self_attn, None, {})


class OtherNorm(torch.nn.Module):
    """An RMSNorm that adds one to its weight."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, 1 + self.weight, self.variance_epsilon)


def test_an_unknown_forward_is_left_alone(folders, everywhere):
    model = load(folders("head-norms"))
    layer = model.model.layers[0]
    layer.self_attn.q_norm = OtherNorm(layer.self_attn.q_norm)
    with pytest.raises(NotFusedError, match="q_norm is not the code"):
        attention.rotate_into_cache(layer.self_attn, None, {})
    layer.input_layernorm = OtherNorm(layer.input_layernorm)
    with pytest.raises(NotFusedError, match=r"OtherNorm.forward is not the code"):
        norms.fuse_norms(layer, None, {})
    other = model.model.layers[1]
    other.forward = types.MethodType(type(other).forward, other)
    with pytest.raises(NotFusedError, match=r"Qwen3DecoderLayer.forward is not the code"):
        norms.fuse_norms(other, None, {})
    assert type(layer).__mro__[1] is not norms.ResidualNorms


def test_the_comparison_of_code():
    def one(x: int) -> int:
        """Words."""
        y: int = abs(x)  # more words
        return max(y, 1, key=None, default=2)

    def two(x):
        y = abs(x)
        return max(y, 1, default=2, key=None)

    def three(x):
        y = abs(x)
        return max(y, 2, default=2, key=None)

    assert fusing.statements(one) == fusing.statements(two) != fusing.statements(three)
    assert fusing.statements(abs) == "" == fusing.statements(lambda x: x)


def test_parts_called_out_of_order_or_with_another_tensor():
    linear = torch.nn.Linear(4, 9).requires_grad_(False)
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Identity(), torch.nn.Identity()
    merged.merge_products(module, linear, {"a": 6, "b": 3})
    x, y = torch.randn(5, 4, generator=GENERATOR), torch.randn(2, 4, generator=GENERATOR)
    for call, z, rows in [
        (module.b, x, slice(6, 9)),
        (module.a, x, slice(0, 6)),
        (module.a, x, slice(0, 6)),
        (module.a, y, slice(0, 6)),
        (module.b, x, slice(6, 9)),
        (module.b, y, slice(6, 9)),
        (module.b, y, slice(6, 9)),
        (module.a, y, slice(0, 6)),
    ]:
        torch.testing.assert_close(call(z), z @ linear.weight[rows].T + linear.bias[rows])
    assert module.a.product._held is None


def test_threads_do_not_take_each_others_shares():
    linear = torch.nn.Linear(4, 9).requires_grad_(False)
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Identity(), torch.nn.Identity()
    merged.merge_products(module, linear, {"a": 6, "b": 3})
    meet, wrong = threading.Barrier(2, timeout=20), []

    def run(x):
        for _ in range(100):
            meet.wait()
            got = torch.cat([module.a(x), module.b(x)], dim=-1)
            wrong.extend([] if torch.allclose(got, linear(x)) else [got])

    threads = [threading.Thread(target=run, args=(torch.randn(3, 4, generator=GENERATOR),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_are_asked_for_the_dtype_of_activations(folders, monkeypatch, dtype):
    """Scales may have another."""
    asked = []
    monkeypatch.setattr(fused, "unfit", lambda needed, device: "")
    monkeypatch.setattr(fusing, "accelerated", asked.append)
    load(folders("grouped-query"), fuse=True, dtype=dtype)
    assert len(asked) == 6 and {one.dtype for one in asked} == {dtype}


def packed(out, inputs=64, group=32, bias=False, scales=torch.float16):
    weights = awq_core.checkpoint.pack.PackedLinear(
        qweight=torch.randint(-(2**31), 2**31 - 1, (inputs, out // 8), generator=GENERATOR).int(),
        qzeros=torch.randint(-(2**31), 2**31 - 1, (inputs // group, out // 8), generator=GENERATOR).int(),
        scales=torch.rand(inputs // group, out, generator=GENERATOR).to(scales),
    )
    return PackedWeights(weights, torch.randn(out, generator=GENERATOR) if bias else None, torch.float32)


def test_merging_stacks_rows():
    parts = [packed(16, bias=True), packed(8), packed(40, bias=True)]
    one = merge(parts, "qkv")
    want = torch.cat([dequantize(part.packed) for part in parts])
    assert torch.equal(dequantize(one.packed), want) and one.out_features == 64
    assert torch.equal(one.bias, torch.cat([parts[0].bias, torch.zeros(8), parts[2].bias]))
    assert merge(parts[1:2], "k").bias is None


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"group": 64}, "group size of k: 64, of q: 32"),
        ({"inputs": 128}, "inputs of k: 128, of q: 64"),
        ({"scales": torch.bfloat16}, r"scales of k: torch.bfloat16, of q: torch.float16"),
    ],
)
def test_unequal_linears_are_not_merged(other, why):
    with pytest.raises(NotFusedError, match=why):
        merge([packed(16), packed(16, **other)], "qk")


def test_blocks_kept_in_16_bits_are_named(tmp_path, tiny_options, capsys):
    save_tiny(LlamaConfig(**tiny_options), tmp_path / "source")
    config = QuantConfig(
        group_size=32, scale=False, clip="none", rounding="nearest", modules_to_not_convert=("layers.0.self_attn",)
    )
    out = awq_core.quantize(tmp_path / "source", tmp_path / "out", config=config).out
    fast = load(out, fuse=True)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("fused qkv in 1 of 2 blocks, gate-up in 2 of 2 blocks; not fused: qkv in 1 of 2 (q_proj is")
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS).logits, load(out)(input_ids=IDS).logits, **EXACT)


def test_the_line():
    made, no_gpu = Outcome("qkv"), Outcome("norms", "no GPU")
    assert summary([made, made]) == "fused qkv in 2 of 2 blocks"
    assert summary([made, no_gpu, Outcome("qkv", "odd"), no_gpu]) == (
        "fused qkv in 1 of 2 blocks; not fused: qkv in 1 of 2 (odd), norms (no GPU)"
    )
    assert summary([]) == "not fused: the plugin declares no fused blocks"


@pytest.mark.parametrize(
    ("needed", "have", "why"),
    [(0, (7, 0), ""), (80, (9, 0), ""), (80, (7, 5), "needs compute capability 80, this GPU has 75")],
)
def test_the_gpu_must_be_capable(monkeypatch, needed, have, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: have)
    assert fused.unfit(needed, torch.device("cuda")) == why
    assert fused.unfit(needed, torch.device("cpu")) == ("no GPU" if needed else "")


# -- other models, other plugins --------------------------------------------------------------------------------------


def test_without_a_plugin_or_without_quantized_linears(folders, llama_source, capsys):
    model = load(folders("grouped-query"), fuse=True, manager=PluginManager(allow=()))
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    load(llama_source, fuse=True)
    assert capsys.readouterr().err.splitlines() == [
        "not fused: no plugin claims the model",
        "not fused: nothing is quantized",
    ]


# The documentation's example of a factory becomes a class of this file.
DOCUMENTED = re.search(r"```py\n(.*?)```", (Path(__file__).parents[2] / "docs/plugins/hooks.md").read_text(), re.DOTALL)
exec(compile(DOCUMENTED[1], "docs/plugins/hooks.md", "exec"), globals())


def broken(module, merged, sizes):
    raise ValueError("out of order")


def nothing(module, merged, sizes):
    return None


def own(factory, match="mlp"):
    """A manager with one plugin that claims Llama and fuses its MLP with a factory of this file."""
    block = FusedBlock(match=match, parts=("gate_proj", "up_proj"), factory=factory)
    stack = LayerStack(component="language", blocks="model.layers")
    arch = Architecture(
        family="acorn", model_types=("llama",), stacks=(stack,), scale_groups=presets.LLAMA_BLOCK, fused=(block,)
    )

    class Plugin:
        @hookimpl
        def awq_architectures(self):
            return (arch,)

    manager = PluginManager(allow=())
    manager.register(Plugin(), "acorn")
    return manager


@torch.no_grad()
def test_a_plugins_own_factory(folders, capsys):
    model = load(folders("multi-head-biases"), fuse=True, manager=own(f"{__name__}:GateUp"))
    assert capsys.readouterr().err.strip() == "fused mlp in 2 of 2 blocks"
    assert type(model.model.layers[1].mlp).__name__ == "GateUp"
    plain = load(folders("multi-head-biases"))
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, **EXACT)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("broken", ("broken raised ValueError: out of order",)),
        ("nothing", ("nothing returned a NoneType, not a module",)),
        ("absent", ("absent", "AttributeError")),
    ],
)
def test_a_factory_that_fails_is_named(folders, factory, words, one_line):
    with pytest.raises(PluginError) as caught:
        load(folders("grouped-query"), fuse=True, manager=own(f"{__name__}:{factory}"))
    one_line(caught.value, "'acorn'", *words)


def test_a_path_that_matches_nothing_is_in_the_line(folders, capsys):
    load(folders("grouped-query"), fuse=True, manager=own(f"{__name__}:GateUp", match="ffn"))
    assert capsys.readouterr().err.strip() == "not fused: ffn (no ffn)"


# -- never in a checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_with_int4_linears_is_not_saved(folders, tmp_path, one_line, fuse):
    model = load(folders("grouped-query"), fuse=fuse)
    with pytest.raises(OutputError) as caught:
        model.save_pretrained(tmp_path / "copy")
    one_line(caught.value, "int4", "copy the folder")
    assert not (tmp_path / "copy").exists()
    names = set(model.state_dict())
    assert not [name for name in names if "product" in name] and names <= set(
        load(folders("grouped-query")).state_dict()
    )


def test_fuse_and_fake_quant_exclude_each_other(folders, one_line):
    with pytest.raises(ConfigError) as caught:
        load(folders("grouped-query"), fuse=True, fake_quant=True)
    one_line(caught.value, "fake_quant")


@pytest.mark.parametrize(
    ("name", "on", "want"), [("linear", "cuda", "static"), ("linear", "cpu", None), ("mixtral", "cuda", None)]
)
def test_generation_on_a_gpu_uses_a_cache_that_graphs_can_hold(folders, monkeypatch, name, on, want):
    model = load(folders(name))
    monkeypatch.setattr(type(model), "device", torch.device(on))
    fused.prefer_graphs(model)
    assert model.generation_config.cache_implementation == want
