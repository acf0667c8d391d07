"""`awq plan`: the text tells each thing once, the JSON is the whole plan, failures have their codes."""

from dataclasses import replace

import pytest
import torch

import awq_core
from awq_core import QuantConfig
from awq_core.cli.plan_text import describe
from awq_core.hooks import Architecture, ComponentPolicy, KernelBackend, LayerStack, ScaleGroup
from awq_core.kernels.cpu import build
from awq_core.kernels.survey import Runner, runners
from awq_core.plan_types import BlockPlan, LinearPlan, Plan
from awq_core.scale_groups import GroupPlan, Skip

G = 32


def test_text(awq, llama_source):
    lines = awq("plan", llama_source, "--group-size", G).stdout.splitlines()
    assert lines[0] == "model         llama, family tiny, by plugin tiny (awq-plugin-tiny 1.2)"
    assert "quantized     14 of 15 linears" in lines
    assert "  language: quantize model.layers.0-1 (groups of 32; default: holds most of the weights)" in lines
    start = lines.index("  language blocks 0-1")
    assert lines[start + 1 : start + 5] == [
        "    input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
        "    self_attn.v_proj -> self_attn.o_proj  [2 heads share each scale]",
        "    post_attention_layernorm -> mlp.gate_proj, mlp.up_proj",
        "    mlp.up_proj -> mlp.down_proj",
    ]
    end = next(number for number, line in enumerate(lines) if line.startswith("kernels here"))
    assert lines[end - 2 : end] == [
        "  1: outside every stack: output heads and small projections stay as they are",
        "    lm_head",
    ]


def test_next_command_repeats_the_options(awq, llama_source):
    options = ["--group-size", G, "--no-clip", "--component", "language=4bit", "--samples", 7]
    (line,) = awq("plan", llama_source, *options).errors[-1:]
    words = "--group-size 32 --no-clip --component language=4bit --samples 7"
    assert line == f"next: awq quantize {llama_source} {words} --out DIR"


def test_json_is_the_whole_plan(awq, read_json, llama_source):
    given = read_json(awq("plan", llama_source, "--group-size", G, "--no-scale", "--json"))
    config = QuantConfig(group_size=G, scale=False, clip="none")
    plan = awq_core.plan(llama_source, config=config)
    assert given["config"] == config.to_dict()
    assert given["bytes_after"] == plan.bytes_after and given["peak_bytes"] == plan.peak_bytes
    assert [linear["name"] for block in given["blocks"] for linear in block["linears"]] == [
        linear.name for block in plan.blocks for linear in block.linears
    ]
    assert given["coverage"] == round(plan.coverage, 4)


def test_a_linear_that_a_group_size_does_not_divide_is_kept_with_its_reason(awq, llama_source):
    lines = awq("plan", llama_source, "--group-size", 64).stdout.splitlines()
    start = lines.index("  2: group size 64 does not divide its 96 inputs")
    assert lines[start + 1] == "    model.layers.0-1.mlp.down_proj"
    assert "    skipped: mlp.up_proj: its readers are kept" in lines


def test_round_to_nearest_names_no_scale_groups(awq, llama_source):
    text = awq("plan", llama_source, "--group-size", G, "--no-scale").stdout
    assert "method        4 bits in groups of 32, round to nearest, no calibration" in text
    assert "scale groups  not used: scales are switched off" in text
    assert " -> self_attn" not in text


def plan_of(*blocks, outside=(), policies=()):
    config = QuantConfig(group_size=G)
    return Plan("oak", "oak", "oak", "awq-plugin-oak", "1", config, policies, blocks, outside, 2000, 1000, 1 << 30)


def block(number, *, experts=0, skipped=(), component="language", path="layers", reason=""):
    """A block with one linear, or with experts beside a router that is kept."""
    where = f"{path}.{number}"
    names = [f"experts.{i}.{leaf}" for i in range(experts) for leaf in ("up", "down")] or ["fc"]
    linears = [
        LinearPlan(f"{where}.{name}", 64, 64, False, not reason, 0 if reason else G, True, reason) for name in names
    ]
    groups = [GroupPlan("norm", tuple(names[::2]), ("router",) if experts else (), names[0], 0.0, "all")]
    groups += [GroupPlan(up, (down,), (), down, 0.0, "all") for up, down in zip(names[::2], names[1::2], strict=False)]
    if experts:
        linears.append(LinearPlan(f"{where}.router", 64, 8, False, False, reason="never quantized"))
    return BlockPlan(component, where, tuple(linears), () if reason else tuple(groups), tuple(skipped), 5000)


def test_identical_blocks_are_told_once_and_different_ones_apart():
    blocks = [
        block(0),
        *(block(i, experts=3) for i in range(1, 5)),
        block(5),
        block(6, skipped=[Skip("a -> b", "odd")]),
    ]
    lines = list(describe(plan_of(*blocks)))
    start = lines.index("scale groups")
    assert lines[start + 1 :] == [
        "  language blocks 0,5",
        "    norm -> fc",
        "  language blocks 1-4",
        "    norm -> experts.0-2.up  [compensated: router]",
        "    experts.0-2.up -> experts.0-2.down",
        "  language block 6",
        "    norm -> fc",
        "    skipped: a -> b: odd",
        "kept linears",
        "  4: never quantized",
        "    layers.1-4.router",
    ]


def test_components_and_reasons():
    tower = [block(i, component="vision", path="tower", reason="vision: small") for i in range(3)]
    policies = (
        ComponentPolicy(component="vision", action="keep", reason="small"),
        ComponentPolicy(component="language", action="quantize"),
    )
    lines = list(describe(plan_of(*tower, block(0), policies=policies)))
    start = lines.index("components")
    assert lines[start + 1 : start + 3] == [
        "  vision: keep tower.0-2 (small)",
        "  language: quantize layers.0 (groups of 32)",
    ]
    assert lines[-3:] == ["kept linears", "  3: vision: small", "    tower.0-2.fc"]


def test_a_stack_of_one_module_goes_by_its_path():
    one = replace(block(0, component="projector"), path="model.projector")
    one = replace(one, linears=(replace(one.linears[0], name="model.projector.fc"),))
    assert "  projector: model.projector" in list(describe(plan_of(one)))


def test_a_whole_row_can_be_one_group(awq, llama_source):
    text = awq("plan", llama_source, "--group-size", -1).stdout
    assert "4 bits in groups of a whole row" in text and "(groups of 64, 96; " in text


def test_nobody_owns_the_model(awq, read_json, plugins, llama_source):
    plugins()
    result = awq("plan", llama_source, "--json", code=3)
    assert read_json(result)["exit_code"] == 3
    assert result.errors[-1].startswith("awq: error: ") and " - try: " in result.errors[-1]


def test_groups_that_do_not_fit_the_model(awq, plugins, llama_source):
    stack = LayerStack(component="language", blocks="model.layers")
    wrong = ScaleGroup(prev="input_layernorm", layers=("attention.query",))
    plugins(Architecture(family="wrong", model_types=("llama",), stacks=(stack,), scale_groups=(wrong,)))
    line = awq("plan", llama_source, "--group-size", G, code=4).errors[-1]
    assert "attention.query" in line and "model.layers.0" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group-size", 48], "group_size=48 is not possible - try: one of 32, 64, 128, -1"),
        (["--bits", 3], "bits=3 is not possible"),
        (["--component", "vision=keep"], "the model has no component 'vision' - try: it has: language"),
        (["--component", "vision=yes"], "component vision='yes' is not known; one of keep, 4bit"),
        (["--component", "vision"], "'vision' is not NAME=CHOICE, such as vision=keep or vision=4bit"),
        (["--component", "vision=8bit"], "component vision=8bit: an AWQ checkpoint holds 4-bit weights, other widths"),
        (["--component", "keep"], "'keep' is not NAME=CHOICE"),
        (["--component", "a=keep", "--component", "a=4bit"], "--component says both a=keep and a=4bit"),
        (["--no-clip", "--clip", "asymmetric"], "--no-clip and --clip asymmetric contradict one another"),
        (["--samples", 0], "--samples"),
        (["--plugin", "tinny"], "tiny"),
    ],
)
def test_usage(awq, llama_source, options, words):
    assert words in awq("plan", llama_source, *options, code=2).errors[-1]


def test_no_such_folder(awq, tmp_path):
    assert "no such model folder" in awq("plan", tmp_path / "none", code=1).errors[-1]


# -- the kernels of the result


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(build, "library", lambda: "no C++ compiler: install g++")


def kernels_shown(result):
    lines = result.stdout.splitlines()
    return lines[next(number for number, line in enumerate(lines) if line.startswith("kernels here")) :]


def test_the_kernel_is_the_one_that_runs_the_result(awq, read_json, llama_source, quantized):
    """What the plan names is what a loaded model has."""
    from awq_core.runtime.linear import QuantLinear

    running = read_json(awq("plan", llama_source, "--group-size", G, "--json"))["running"]
    loaded = [one.backend for one in awq_core.load(quantized).modules() if isinstance(one, QuantLinear)]
    assert (running["device"], running["dtype"]) == ("cpu", "float32")
    assert {one["name"]: one["linears"] for one in running["kernels"]} == {loaded[0]: len(loaded)}


def test_why_a_better_kernel_does_not_run_it(awq, llama_source, no_library):
    assert kernels_shown(awq("plan", llama_source, "--group-size", G)) == [
        "kernels here, on cpu in float32",
        "  reference: 14 linears",
        "    not cpu: no C++ compiler: install g++",
        "    not int4pack: float32 activations would run a scalar loop; bfloat16 only",
    ]


def test_a_forced_kernel_is_named_as_forced(awq, llama_source, monkeypatch, no_library):
    monkeypatch.setenv("AWQ_KERNEL", "reference")
    lines = kernels_shown(awq("plan", llama_source, "--group-size", G))
    assert lines[1:] == ["  reference: 14 linears (AWQ_KERNEL=reference)"]
    monkeypatch.setenv("AWQ_KERNEL", "int4pack")
    (line,) = kernels_shown(awq("plan", llama_source, "--group-size", G))[1:]
    assert line.startswith("  none: 14 linears (no int4 kernel runs this linear: int4pack: float32 activations")


class Narrow:
    """Runs nothing wider than 64 inputs."""

    def unsupported(self, packed, dtype):
        return "too wide" if packed.qweight.shape[0] > 64 else ""


def test_linears_of_one_model_may_run_on_different_kernels(monkeypatch):
    from awq_core import kernels

    monkeypatch.setitem(kernels._MADE, "made:up", Narrow())
    narrow = KernelBackend(name="narrow", formats=("gemm",), devices=("cpu",), factory="made:up", priority=99)
    reference, *_ = kernels.KERNEL_BACKENDS
    shapes = [(64, 32, 32), (96, 64, 32), (64, 32, 32), (64, 64, 64)]
    assert runners(shapes, torch.bfloat16, "cpu", (reference, narrow)) == (
        Runner("narrow", 3, "", {}),
        Runner("reference", 1, "", {"narrow": "too wide"}),
    )


def test_nothing_quantized_names_no_kernel(awq, llama_source):
    assert "kernels here" not in awq("plan", llama_source, "--component", "language=keep").stdout
