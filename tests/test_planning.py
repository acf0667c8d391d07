"""Plans made from config.json alone: what is quantized, what is kept and why, how large it gets."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)
from transformers.quantizers.quantizers_utils import should_convert_module

import awq_core
from awq_core import QuantConfig
from awq_core.checkpoint.reader import CheckpointReader
from awq_core.errors import ConfigError, PlanError, UnsupportedModelError
from awq_core.hooks import Architecture, ComponentPolicy, LayerStack, ScaleGroup, hookimpl, presets
from awq_core.hooks.manager import PluginManager
from awq_core.shared_heads import SharedHeads
from awq_core.testing import save_tiny

LANGUAGE = LayerStack(component="language", blocks="model.layers")
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@pytest.fixture
def planned(tmp_path):
    """planned(config, group_size=32): a plan made of a folder that holds config.json and nothing else."""

    def make(config, *, manager=None, **settings):
        folder = tmp_path / f"config-{len(list(tmp_path.iterdir()))}"
        config.save_pretrained(folder)
        plan = awq_core.plan(folder, config=QuantConfig(**{"group_size": 32, **settings}), manager=manager)
        assert [path.name for path in folder.iterdir()] == ["config.json"], "a plan writes nothing"
        return plan

    return make


def plugin(model_type="llama", prepare=None, **fields):
    """A manager with one plugin that declares what a test wants to see planned."""
    fields.setdefault("stacks", (LANGUAGE,))
    arch = Architecture(family="acorn", model_types=(model_type,), **fields)

    class Plugin:
        @hookimpl
        def awq_architectures(self):
            return (arch,)

        @hookimpl
        def awq_prepare_model(self, arch, model):
            return prepare(model) if prepare else None

    manager = PluginManager(allow=())
    manager.register(Plugin(), "acorn", dist="awq-plugin-acorn", version="1.2")
    return manager


def fates(plan):
    """Name -> reason, "" for a quantized linear."""
    return {linear.name: linear.reason for linear in plan.linears}


def quantized(plan):
    return {linear.name for linear in plan.linears if linear.quantize}


def llava(**text):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=16, patch_size=4),
        text_config=LlamaConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": 128,
                **text,
            }
        ),
        image_token_index=2,
    )


# -- what is planned --------------------------------------------------------------------------------------------------


def test_every_linear_has_a_fate(planned, llama_config):
    plan = planned(llama_config())
    assert [block.path for block in plan.blocks] == ["model.layers.0", "model.layers.1"]
    for block in plan.blocks:
        assert [linear.name for linear in block.linears] == [f"{block.path}.{name}" for name in LINEARS]
        assert all(linear.quantize and linear.group_size == 32 for linear in block.linears)
        clipped = {linear.name.removeprefix(block.path + ".") for linear in block.linears if linear.clip}
        assert clipped == set(LINEARS) - {"self_attn.q_proj", "self_attn.k_proj"}
        assert [(group.prev, group.layers) for group in block.groups] == [
            ("input_layernorm", LINEARS[:3]),
            ("self_attn.v_proj", ("self_attn.o_proj",)),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.up_proj", ("mlp.down_proj",)),
        ]
        assert block.groups[1].shared == SharedHeads(repeats=2, head_dim=16)  # 2 key-value heads for 4 queries
        assert not block.skipped
    assert [linear.name for linear in plan.outside] == ["lm_head"]
    assert plan.outside[0].reason and not plan.outside[0].quantize
    assert (plan.family, plan.plugin, plan.dist) == ("llama", "llama", "awq-plugin-llama")


def test_a_linear_whose_weight_the_model_reads_is_kept(planned, llama_config):
    manager = plugin(scale_groups=presets.LLAMA_BLOCK, keep=("mlp.down_*", "self_attn.nothing"))
    plan = planned(llama_config(), manager=manager)
    for index in range(2):
        name = f"model.layers.{index}.mlp.down_proj"
        assert fates(plan)[name] == "the model reads its weight instead of calling it"
    assert len(quantized(plan)) == 2 * (len(LINEARS) - 1)
    assert {skip.why for block in plan.blocks for skip in block.skipped} == {"its readers are kept"}


def test_multi_head_attention_shares_nothing(planned, llama_config):
    plan = planned(llama_config(num_key_value_heads=4))
    assert ("self_attn.v_proj", ("self_attn.o_proj",)) in [(g.prev, g.layers) for g in plan.blocks[0].groups]
    assert {group.shared for group in plan.blocks[0].groups} == {None}
    assert not plan.blocks[0].skipped


def test_shapes_and_biases_are_the_models(planned, llama_config):
    plan = planned(llama_config(attention_bias=True), group_size=-1)
    found = {linear.name: linear for linear in plan.blocks[1].linears}
    query, down = found["model.layers.1.self_attn.k_proj"], found["model.layers.1.mlp.down_proj"]
    assert (query.in_features, query.out_features, query.bias, query.group_size) == (64, 32, True, 64)
    assert (down.in_features, down.out_features, down.bias, down.group_size) == (96, 64, False, 96)


def test_coverage_counts_parameters(planned, llama_config):
    plan = planned(llama_config())
    weights = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
    assert plan.coverage == pytest.approx(weights / (weights + 2 * 64), abs=1e-9)  # the two norms are not
    assert planned(llama_config(), modules_to_not_convert=("mlp",)).coverage == pytest.approx(
        (64 * 64 * 2 + 64 * 32 * 2) / (weights + 2 * 64), abs=1e-9
    )


def test_a_plan_is_json(planned, llama_config):
    text = json.dumps(planned(llama_config()).to_dict())
    assert json.loads(text)["blocks"][0]["linears"][0]["name"] == "model.layers.0.self_attn.q_proj"


def test_nobody_claims_the_model(planned, llama_config, one_line):
    with pytest.raises(UnsupportedModelError) as caught:
        planned(llama_config(), manager=PluginManager(allow=()))
    one_line(caught.value, "'llama'", "pip install awq-plugin-llama")
    assert caught.value.exit_code == 3


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_keeps_the_linear(planned, llama_config):
    plan = planned(llama_config(), group_size=64)
    kept = {name: reason for name, reason in fates(plan).items() if reason and name != "lm_head"}
    assert set(kept) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert set(kept.values()) == {"group size 64 does not divide its 96 inputs"}
    for block in plan.blocks:
        assert [group.prev for group in block.groups] == [
            *("input_layernorm", "self_attn.v_proj", "post_attention_layernorm")
        ]
        assert ("mlp.up_proj", "its readers are kept") in [(skip.where, skip.why) for skip in block.skipped]


def test_a_linear_that_cannot_be_packed_keeps_its_group(planned, llama_config):
    config = llama_config(num_attention_heads=16, num_key_value_heads=1)  # k and v: 4 outputs
    reasons = fates(planned(config))
    assert reasons["model.layers.0.self_attn.k_proj"] == "4 outputs are not a multiple of 8"
    assert reasons["model.layers.0.self_attn.v_proj"] == "4 outputs are not a multiple of 8"
    assert reasons["model.layers.0.self_attn.q_proj"] == "kept together with self_attn.k_proj"
    assert reasons["model.layers.0.self_attn.o_proj"] == ""
    assert reasons["model.layers.0.mlp.gate_proj"] == ""


def test_mates_are_kept_together_where_no_scale_can_be_folded(planned, llama_config):
    """A norm without weight holds no scale, yet engines fuse q, k and v all the same."""

    def prepare(model):
        for layer in model.model.layers:
            layer.input_layernorm = nn.LayerNorm(64, elementwise_affine=False)
        return True

    manager = plugin(prepare=prepare, scale_groups=presets.LLAMA_BLOCK)
    plan = planned(llama_config(), manager=manager, modules_to_not_convert=("k_proj",))
    reasons = fates(plan)
    assert "no weight" in next(skip.why for skip in plan.blocks[0].skipped if skip.where.startswith("input_layernorm"))
    assert "k_proj" in reasons["model.layers.0.self_attn.k_proj"]
    for name in ("q_proj", "v_proj"):
        assert reasons[f"model.layers.0.self_attn.{name}"] == "kept together with self_attn.k_proj"


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (("up_proj",), {f"model.layers.{i}.mlp.{n}_proj" for i in range(2) for n in ("gate", "up")}),
        (("layers.1.mlp.down",), {"model.layers.1.mlp.down_proj"}),
        (("layers.0.",), {f"model.layers.0.{name}" for name in LINEARS}),
        (("nothing", "lm_head"), set()),
    ],
)
def test_modules_to_not_convert(planned, llama_config, patterns, kept):
    plan = planned(llama_config(), modules_to_not_convert=patterns)
    everything = {f"model.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert quantized(plan) == everything - kept
    assert all(reason for name, reason in fates(plan).items() if name in kept)


def test_a_router_is_never_quantized_even_where_its_norm_is_not_scaled(planned, tiny_options):
    """The shared expert's gate and the router are linears in some models; here the router is made one."""

    def prepare(model):
        for layer in model.model.layers:
            layer.post_attention_layernorm = nn.LayerNorm(64, elementwise_affine=False)
            layer.mlp.router = nn.Linear(64, 8, bias=False, device="meta")
        return True

    mlp = ScaleGroup(
        prev="post_attention_layernorm", layers=("mlp.gate_proj", "mlp.up_proj"), compensate=("mlp.router",)
    )
    manager = plugin(prepare=prepare, scale_groups=(*presets.attention(), mlp))
    reasons = fates(planned(LlamaConfig(**tiny_options), manager=manager))
    assert "never quantized" in reasons["model.layers.0.mlp.router"]
    assert reasons["model.layers.0.mlp.up_proj"] == ""


def test_a_mixture_keeps_its_routers(planned, tiny_options):
    plan = planned(
        Qwen2MoeConfig(**tiny_options, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=96),
    )
    reasons = fates(plan)
    experts = {f"mlp.experts.{e}.{n}_proj" for e in range(4) for n in ("gate", "up", "down")}
    shared = {f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")}
    for layer in range(2):
        names = {name.removeprefix(f"model.layers.{layer}.") for name in quantized(plan) if f"layers.{layer}." in name}
        assert names == experts | shared | set(LINEARS[:4])
        assert "never quantized" in reasons[f"model.layers.{layer}.mlp.shared_expert_gate"]
    group = next(group for group in plan.blocks[0].groups if group.prev == "post_attention_layernorm")
    assert set(group.compensate) == {"mlp.gate", "mlp.shared_expert_gate"}
    assert sum(group.prev.startswith("mlp.experts.") for group in plan.blocks[0].groups) == 4


# -- components -------------------------------------------------------------------------------------------------------


def test_vision_and_projector_are_kept_by_default(planned):
    plan = planned(llava())
    assert {policy.component: policy.action for policy in plan.policies} == {
        "vision": "keep",
        "projector": "keep",
        "language": "quantize",
    }
    assert quantized(plan) == {f"model.language_model.layers.{i}.{name}" for i in range(2) for name in LINEARS}
    vision = [reason for name, reason in fates(plan).items() if "vision" in name]
    assert len(vision) == 18 and all(reason.startswith("vision: ") for reason in vision)


def test_components_are_overridden(planned):
    plan = planned(llava(), components={"vision": "4bit", "language": "keep"})
    actions = {policy.component: (policy.action, policy.reason) for policy in plan.policies}
    assert actions["vision"] == ("quantize", "asked for")
    assert actions["language"] == ("keep", "asked for")
    assert actions["projector"][0] == "keep"
    assert {name.split(".")[1] for name in quantized(plan)} == {"vision_tower"} and len(quantized(plan)) == 18
    assert {reason for name, reason in fates(plan).items() if "language_model.layers" in name} == {
        "language: asked for"
    }


def test_an_unknown_component_is_refused(planned, llama_config, one_line):
    with pytest.raises(ConfigError) as caught:
        planned(llama_config(), components={"vision": "keep"})
    one_line(caught.value, "'vision'", "language")
    assert caught.value.exit_code == 2


def test_the_language_groups_come_from_the_text_models_plugin(planned):
    plan = planned(llava())
    assert plan.family == "llava"
    language = [block for block in plan.blocks if block.component == "language"]
    assert [(group.prev, group.layers) for group in language[0].groups] == [
        (group.prev, group.layers) for group in presets.LLAMA_BLOCK
    ]


def test_the_text_model_needs_a_plugin_too(planned, one_line):
    stack = LayerStack(component="language", blocks="model.language_model.layers", groups_from="text_config")
    with pytest.raises(UnsupportedModelError) as caught:
        planned(llava(), manager=plugin("llava", stacks=(stack,)))
    one_line(caught.value, "'llama'")


@pytest.mark.parametrize("field", [{"bits": 8}, {"group_size": 128}])
def test_a_policy_the_format_cannot_hold_is_refused(planned, llama_config, field, one_line):
    policy = ComponentPolicy(component="language", action="quantize", **field)
    manager = plugin(scale_groups=presets.LLAMA_BLOCK, components=(policy,))
    with pytest.raises(PlanError) as caught:
        planned(llama_config(), manager=manager)
    (name, value), *_ = field.items()
    one_line(caught.value, "awq-plugin-acorn", f"{name}={value}", "language")
    kept = plugin(scale_groups=presets.LLAMA_BLOCK, components=(dataclasses.replace(policy, action="keep"),))
    assert not quantized(planned(llama_config(), manager=kept))


def test_a_stack_may_be_one_linear(planned, llama_config):
    stacks = (LANGUAGE, LayerStack(component="head", blocks="lm_head"))
    manager = plugin(stacks=stacks, scale_groups=presets.LLAMA_BLOCK)
    plan = planned(llama_config(), manager=manager, components={"head": "4bit", "language": "keep"})
    assert quantized(plan) == {"lm_head"} and not plan.outside
    assert plan.kept_prefixes() == ["model"]
    kept = planned(llama_config(), manager=manager)
    assert fates(kept)["lm_head"].startswith("head: ")


# -- declarations that cannot be right --------------------------------------------------------------------------------


def test_a_stack_that_is_not_there(planned, llama_config, one_line):
    manager = plugin(stacks=(LayerStack(component="language", blocks="model.decoder.layers"),))
    with pytest.raises(PlanError) as caught:
        planned(llama_config(), manager=manager)
    one_line(caught.value, "'language'", "model.decoder.layers", "model.layers")


def test_a_sub_configuration_that_is_not_there(planned, llama_config, one_line):
    stack = LayerStack(component="language", blocks="model.layers", groups_from="text_config")
    with pytest.raises(PlanError) as caught:
        planned(llama_config(), manager=plugin(stacks=(stack,)))
    one_line(caught.value, "'language'", "'text_config'")


def test_a_group_that_does_not_fit_names_its_block(planned, llama_config, one_line):
    manager = plugin(scale_groups=(ScaleGroup(prev="ln_1", layers=("self_attn.q_proj",)),))
    with pytest.raises(PlanError) as caught:
        planned(llama_config(), manager=manager)
    one_line(caught.value, "model.layers.0", "'ln_1'", "self_attn.q_proj")


# -- modules_to_not_convert, as engines read it -----------------------------------------------------------------------


def kept_by_substring(name, prefixes):
    """vLLM: any prefix anywhere in the name."""
    return any(prefix in name for prefix in prefixes)


def kept_by_start(name, prefixes):
    """transformers' first 5.x releases: a regular expression at the start, or an end."""
    return any(re.match(prefix, name) or name.endswith(prefix) for prefix in prefixes)


def kept_by_transformers(name, prefixes):
    return not should_convert_module(name, prefixes)


@pytest.mark.parametrize("engine", [kept_by_substring, kept_by_start, kept_by_transformers])
@pytest.mark.parametrize(
    "case",
    ["plain", "block 1 of 12", "block 1 and all gates", "vision", "language kept", "mixture", "mixture by group"],
)
def test_kept_prefixes_say_exactly_what_is_kept(planned, llama_config, tiny_options, engine, case):
    many = {"num_hidden_layers": 12}
    mixture = MixtralConfig(**tiny_options, num_local_experts=12)
    plan = {
        "plain": lambda: planned(llama_config()),
        "block 1 of 12": lambda: planned(llama_config(**many), modules_to_not_convert=("layers.1.",)),
        "block 1 and all gates": lambda: planned(llama_config(**many), modules_to_not_convert=("layers.1.", "gate")),
        "vision": lambda: planned(llava()),
        "language kept": lambda: planned(llava(), components={"vision": "4bit", "language": "keep"}),
        "mixture": lambda: planned(mixture, modules_to_not_convert=("experts.1.",)),
        "mixture by group": lambda: planned(mixture, group_size=64),
    }[case]()
    prefixes = plan.kept_prefixes()
    assert prefixes and any(linear.quantize for linear in plan.linears)
    for linear in plan.linears:
        assert engine(linear.name, prefixes) == (not linear.quantize), linear.name


def test_kept_prefixes_are_short(planned, llama_config):
    assert planned(llama_config()).kept_prefixes() == ["lm_head"]
    assert planned(llava()).kept_prefixes() == ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "group_size", "options"),
    [
        (torch.float32, 32, {"attention_bias": True}),
        (torch.bfloat16, 128, {"tie_word_embeddings": True}),
        (torch.float16, -1, {"num_key_value_heads": 4}),
    ],
)
def test_the_estimate_is_what_is_written(tmp_path, llama_config, dtype, group_size, options):
    config = llama_config(hidden_size=128, intermediate_size=320, num_hidden_layers=1, vocab_size=512, **options)
    source, out = tmp_path / "source", tmp_path / "out"
    save_tiny(config, source, dtype=dtype)
    settings = QuantConfig(group_size=group_size, scale=False, clip="none")
    plan = awq_core.plan(source, config=settings)
    result = awq_core.quantize(source, out, config=settings)
    with CheckpointReader(source) as before, CheckpointReader(out) as after:
        assert plan.bytes_before == before.total_bytes
        assert plan.bytes_after == after.total_bytes
    files = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert files == pytest.approx(plan.bytes_after, rel=0.02)  # the difference is the header
    assert result.plan == plan.__class__(**{**vars_of(plan), "peak_bytes": result.plan.peak_bytes})


def vars_of(value):
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def test_peak_memory_does_not_grow_with_depth(planned, llama_config):
    shallow, deep = planned(llama_config(num_hidden_layers=2)), planned(llama_config(num_hidden_layers=24))
    assert deep.peak_bytes == shallow.peak_bytes
    assert deep.bytes_before > shallow.bytes_before
    wide = planned(llama_config(hidden_size=128, intermediate_size=512))
    assert wide.peak_bytes > shallow.peak_bytes
    without = planned(llama_config(), scale=False, clip="none")
    assert without.peak_bytes < shallow.peak_bytes
    nearest, once = planned(llama_config(), rounding="nearest"), planned(llama_config(), correct_inputs=0)
    assert once.peak_bytes == nearest.peak_bytes + 2 * 96 * 96 * 4, "a factor of the widest input's Gram matrix"
    assert shallow.peak_bytes > once.peak_bytes, "two versions of the activations"
