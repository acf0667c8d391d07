"""docs/plugins/hooks.md is complete, its examples run, and every hook has a test."""

import ast
import dataclasses
import importlib
import re
import types
from pathlib import Path

import pytest

import awq_core.hooks
from awq_core.hooks import ComponentPolicy, LayerStack, presets
from awq_core.hooks.manager import PluginManager
from awq_core.hooks.signatures import HOOKS, implemented
from awq_core.hooks.suggestions import suggest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/plugins/hooks.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
VALUES = [getattr(awq_core.hooks, name) for name in awq_core.hooks.__all__]
VALUES = [value for value in VALUES if dataclasses.is_dataclass(value)]


def section(title):
    """The text under one `### title`."""
    _, found, rest = PAGE.partition(f"\n### `{title}`\n")
    assert found, f"docs/plugins/hooks.md has no section '### `{title}`'"
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_documented(hook):
    signature = f"{hook}({', '.join(HOOKS[hook])})"
    assert f"| `{signature}` |" in PAGE, "missing in the table of hooks"
    assert "```python\n" in section(signature), "has no example"
    assert f"def {hook}(" in section(signature), "the example implements another hook"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)
def test_fields_are_documented(value):
    rows = {
        row[0].strip("` "): row
        for row in re.findall(r"^\| (.+?) \| *(.*?) *\| (.*) \|$", section(value.__name__), re.M)
    }
    rows.pop("field"), rows.pop("---", None)
    fields = {field.name: field for field in dataclasses.fields(value)}
    assert list(rows) == list(fields), "rows and fields differ, or their order does"
    for name, (_, default, meaning) in rows.items():
        expected = fields[name].default
        shown = "" if expected is dataclasses.MISSING else f"`{expected!r}`".replace("'", '"')
        assert default == shown, f"default of {name}"
        assert len(meaning) > 5, f"meaning of {name}"


def test_no_section_describes_what_does_not_exist():
    titles = re.findall(r"^### `(\w+)", PAGE, re.MULTILINE)
    assert sorted(titles) == sorted([*HOOKS, *(value.__name__ for value in VALUES)])


def test_every_hook_has_a_test():
    names = {
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert [hook for hook in HOOKS if f"test_hook_{hook}" not in names] == []


def example(hook=None):
    """Run one block of the page as a module; the one that implements `hook` alone."""
    (source,) = [block for block in BLOCKS if f"def {hook}(" in block and "PluginManager" not in block]
    module = types.ModuleType("awq_plugin_acorn")
    exec(compile(source, "docs/plugins/hooks.md", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs_and_may_be_registered(block):
    module = types.ModuleType("awq_plugin_acorn")
    exec(compile(block, "docs/plugins/hooks.md", "exec"), module.__dict__)
    info = PluginManager(allow=(), core_version="0.1.0").register(module, "acorn")
    assert info.hooks == implemented(module) != ()


@pytest.fixture
def asked(manager, plugin, config, architecture):
    """asked("awq_layer_stacks"): a manager with the page's example of a hook, and the owner of its model."""

    def make(hook):
        module = example(hook)
        if hook != "awq_architectures":
            stack = LayerStack(component="language", blocks="model.layers")
            module.awq_architectures = plugin("acorn", architecture("acorn", stacks=(stack,))).awq_architectures
        manager.register(module, "acorn")
        return manager, manager.owner(config("acorn"))

    return make


LANGUAGE = LayerStack(component="language", blocks="model.layers")


def test_example_of_architectures(asked):
    manager, owner = asked("awq_architectures")
    assert [group.prev for group in manager.scale_groups(owner, LANGUAGE, None, 0)] == ["ln", "attn.v"]


def test_example_of_kernel_backends(asked):
    manager, _ = asked("awq_kernel_backends")
    assert "acorn-npu" in [backend.name for backend in manager.kernel_backends()]


def test_example_of_layer_stacks(asked):
    manager, owner = asked("awq_layer_stacks")
    whole, body = types.SimpleNamespace(model=None), types.SimpleNamespace()
    assert manager.layer_stacks(owner, whole)[0].blocks == "model.layers"
    assert manager.layer_stacks(owner, body)[0].blocks == "layers"


def test_example_of_scale_groups(asked):
    manager, owner = asked("awq_scale_groups")
    dense = types.SimpleNamespace(mlp=types.SimpleNamespace())
    mixture = types.SimpleNamespace(mlp=types.SimpleNamespace(experts=[]))
    assert manager.scale_groups(owner, LANGUAGE, dense, 0) == presets.LLAMA_BLOCK
    assert manager.scale_groups(owner, LANGUAGE, mixture, 1) == (*presets.attention(), *presets.moe_mlp())
    assert manager.scale_groups(owner, LayerStack(component="vision", blocks="x"), dense, 0) == ()


def test_example_of_component_policies(asked):
    manager, owner = asked("awq_component_policies")
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(hidden_size=768))
    _, vision = manager.component_policies(owner, config)
    assert vision == ComponentPolicy(component="vision", action="keep", reason="a small tower gains nothing")
    config.vision_config.hidden_size = 4096
    assert manager.component_policies(owner, config)[1].bits == 8


def test_example_of_fused_blocks(asked):
    manager, owner = asked("awq_fused_blocks")
    assert manager.fused_blocks(owner, None, "reference") == ()
    assert manager.fused_blocks(owner, None, "triton")[0].parts == ("gate_proj", "up_proj")


def test_example_of_calibration_batch(asked):
    manager, owner = asked("awq_calibration_batch")

    def tokenizer(text, return_tensors):
        return {"input_ids": text, "token_type_ids": 0}

    assert manager.calibration_batch(owner, tokenizer, {"text": "x"}) == {"input_ids": "x"}


def test_example_of_prepare_model(asked):
    import torch

    manager, owner = asked("awq_prepare_model")
    layer = torch.nn.Module()
    layer.experts = torch.nn.Parameter(torch.empty(3, 8, 4, device="meta"))
    model = types.SimpleNamespace(layers=[layer])
    assert manager.prepare_model(owner, model) is True
    assert [(one.in_features, one.out_features) for one in layer.experts] == [(4, 8)] * 3
    assert manager.prepare_model(owner, model) is False


def test_plugins_of_this_repository_are_suggested(manager, monkeypatch):
    """Whoever lacks one of our plugins must be told its name: every model type it claims is in suggestions.py."""
    missing = []
    for path in sorted((ROOT / "plugins").glob("*/awq_plugin_*/__init__.py")):
        family = path.parents[1].name
        monkeypatch.syspath_prepend(str(path.parents[1]))
        module = importlib.import_module(path.parent.name)
        info = manager.register(module, family, f"awq-plugin-{family}", "0")
        missing += [f"{family}: {kind}" for kind in info.model_types if suggest(kind) != info.dist]
    assert missing == [], "add these to FAMILIES in awq_core/hooks/suggestions.py"
