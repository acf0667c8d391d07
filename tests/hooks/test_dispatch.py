"""A hook about one model is asked of its owner and of nobody else, in whatever order plugins were registered."""

import itertools

import pytest

from awq_core.errors import PluginError
from awq_core.hooks import LayerStack, hookimpl
from awq_core.hooks.manager import PluginManager

CALLS = {
    "awq_layer_stacks": lambda manager, owner: manager.layer_stacks(owner, None),
    "awq_scale_groups": lambda manager, owner: manager.scale_groups(owner, owner.arch.stacks[0], None, 0),
    "awq_component_policies": lambda manager, owner: manager.component_policies(owner, None),
    "awq_fused_blocks": lambda manager, owner: manager.fused_blocks(owner, None, "reference"),
    "awq_calibration_batch": lambda manager, owner: manager.calibration_batch(
        owner, lambda text, return_tensors: {"input_ids": text}, {"text": "x"}
    ),
    "awq_prepare_model": lambda manager, owner: manager.prepare_model(owner, None),
}


@pytest.mark.parametrize("hook", CALLS)
@pytest.mark.parametrize("order", itertools.permutations(("acorn", "birch", "cedar")))
def test_other_plugins_are_never_asked(plugin, config, hook, order):
    """birch and cedar would answer, and raise; acorn implements nothing beyond its claim."""

    def trap():
        raise AssertionError("asked about a model of another plugin")

    manager = PluginManager(allow=(), core_version="0.1.0")
    for name in order:
        manager.register(plugin(name, **({} if name == "acorn" else {hook: trap})), name)
    CALLS[hook](manager, manager.owner(config("acorn")))
    with pytest.raises(PluginError, match="plugin 'birch'"):
        CALLS[hook](manager, manager.owner(config("birch")))


@pytest.mark.parametrize("order", itertools.permutations(("acorn", "birch")))
def test_each_owner_gives_its_own_answer(plugin, config, order):
    manager = PluginManager(allow=(), core_version="0.1.0")
    for name in order:
        stack = LayerStack(component="language", blocks=f"{name}.found")
        manager.register(plugin(name, awq_layer_stacks=_returning([stack])), name)
    for name in order:
        assert manager.layer_stacks(manager.owner(config(name)), None)[0].blocks == f"{name}.found"


def _returning(value):
    return lambda: value


@pytest.mark.parametrize("options", [{}, {"tryfirst": True}])
def test_owner_is_asked_before_the_defaults(manager, plugin, config, options):
    acorn = plugin("acorn")
    stack = LayerStack(component="language", blocks="mine")
    acorn.awq_layer_stacks = hookimpl(**options)(lambda: [stack])
    manager.register(acorn, "acorn")
    assert manager.layer_stacks(manager.owner(config("acorn")), None) == (stack,)


def test_hooks_receive_the_architecture_that_owns_the_model(manager, plugin, architecture, config):
    seen = []

    def awq_layer_stacks(arch):
        seen.append(arch.family)

    two = (architecture("acorn"), architecture("acorn_moe"))
    manager.register(plugin("acorn", *two, awq_layer_stacks=awq_layer_stacks), "acorn")
    manager.layer_stacks(manager.owner(config("acorn_moe")), None)
    manager.layer_stacks(manager.owner(config("acorn")), None)
    assert seen == ["acorn_moe", "acorn"]


def test_methods_of_an_object_are_hooks_too(manager, architecture, config):
    class Plugin:
        def __init__(self, blocks):
            self.blocks = blocks

        @hookimpl
        def awq_architectures(self):
            return [architecture("acorn")]

        @hookimpl
        def awq_layer_stacks(self, model, arch):
            return [LayerStack(component="language", blocks=f"{model}.{self.blocks}")]

    manager.register(Plugin("layers"), "acorn")
    assert manager.layer_stacks(manager.owner(config("acorn")), "body")[0].blocks == "body.layers"


def test_owner_of_another_manager_is_refused(manager, plugin, config):
    """The defaults would answer in the plugin's place, and nobody would notice."""
    elsewhere = PluginManager(allow=(), core_version="0.1.0")
    elsewhere.register(plugin("acorn"), "acorn")
    with pytest.raises(PluginError, match="not registered with this manager"):
        manager.layer_stacks(elsewhere.owner(config("acorn")), None)


def test_plugin_registered_later_is_dispatched_too(manager, plugin, config):
    manager.register(plugin("acorn"), "acorn")
    owner = manager.owner(config("acorn"))
    before = manager.scale_groups(owner, owner.arch.stacks[0], None, 0)
    manager.register(plugin("birch", awq_scale_groups=lambda: []), "birch")
    assert manager.scale_groups(owner, owner.arch.stacks[0], None, 0) == before != ()


# -- AWQ_TRACE_PLUGINS


def test_trace_prints_who_answered_what(manager, plugin, config, monkeypatch, capsys):
    manager.register(plugin("acorn", awq_scale_groups=lambda index: [] if index else None), "acorn", "a-dist", "1.0")
    owner = manager.owner(config("acorn"))
    manager.scale_groups(owner, owner.arch.stacks[0], object(), 0)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("AWQ_TRACE_PLUGINS", "1")
    manager.scale_groups(owner, owner.arch.stacks[0], object(), 0)
    manager.scale_groups(owner, owner.arch.stacks[0], object(), 1)
    captured = capsys.readouterr()
    call = "awq trace: awq_scale_groups(arch=acorn, stack=language, block=<object>, index="
    first, second, third = captured.err.splitlines()
    assert first == f"{call}0) -> plugin 'acorn' (a-dist 1.0): None"
    assert second.startswith(f"{call}0) -> plugin 'awq-core defaults' (awq-core 0.1.0): (ScaleGroup(prev='norm'")
    assert third == f"{call}1) -> plugin 'acorn' (a-dist 1.0): []"
    assert captured.out == ""


def test_trace_shortens_long_answers(manager, plugin, config, monkeypatch, capsys):
    stacks = [LayerStack(component="language", blocks="x" * 5000)] * 50
    manager.register(plugin("acorn", awq_layer_stacks=lambda: stacks), "acorn")
    monkeypatch.setenv("AWQ_TRACE_PLUGINS", "1")
    assert len(manager.layer_stacks(manager.owner(config("acorn")), None)) == 50
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 400


def test_trace_survives_a_repr_that_fails(manager, plugin, config, monkeypatch, capsys):
    class Awkward(dict):
        def __repr__(self):
            raise RuntimeError

    manager.register(plugin("acorn", awq_calibration_batch=lambda: {"x": Awkward()}), "acorn")
    monkeypatch.setenv("AWQ_TRACE_PLUGINS", "1")
    assert "x" in manager.calibration_batch(manager.owner(config("acorn")), None, {})
    assert "awq_calibration_batch" in capsys.readouterr().err
