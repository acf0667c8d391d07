"""The rules of hook implementations: what pluggy would accept in silence is refused with the right form."""

import functools
import types

import pytest

from awq_core.errors import PluginError
from awq_core.hooks import hookimpl
from awq_core.hooks.signatures import HOOKS, implemented, problems

GROUPS = "awq_scale_groups(arch, stack, block, index)"


def module(**functions):
    made = types.ModuleType("acorn")
    for name, function in functions.items():
        setattr(made, name, function)
    return made


def test_there_are_eight_hooks():
    assert len(HOOKS) == 8
    assert HOOKS["awq_scale_groups"] == ("arch", "stack", "block", "index")
    assert HOOKS["awq_architectures"] == ()


def test_fewer_arguments_in_any_order_are_fine():
    plugin = module(
        awq_architectures=hookimpl(lambda: []),
        awq_scale_groups=hookimpl(lambda index, arch: []),
        awq_layer_stacks=hookimpl(lambda: []),
    )
    assert problems(plugin) == []
    assert implemented(plugin) == ("awq_architectures", "awq_layer_stacks", "awq_scale_groups")


@pytest.mark.parametrize(
    ("name", "function", "problem"),
    [
        ("awq_scale_group", lambda: 0, "awq_scale_group is not a hook; did you mean 'awq_scale_groups'?"),
        ("scale_groups", lambda: 0, "scale_groups is not a hook; did you mean 'awq_scale_groups'?"),
        ("awq_zzz", lambda: 0, "awq_zzz is not a hook; known: awq_architectures, awq_kernel_backends"),
        ("awq_scale_groups", lambda blocks: 0, f"unknown parameter 'blocks'; did you mean 'block'?: {GROUPS}"),
        ("awq_architectures", lambda arch: 0, "unknown parameter 'arch'; known: none, it takes no arguments"),
        ("awq_scale_groups", lambda block, index=0: 0, f"gives 'index' a default; write 'index' without one: {GROUPS}"),
        ("awq_scale_groups", lambda *, block: 0, f"makes 'block' keyword-only; remove the '*' before it: {GROUPS}"),
        ("awq_scale_groups", lambda *args: 0, f"takes *args; name the arguments it needs: {GROUPS}"),
        ("awq_scale_groups", lambda **kwargs: 0, f"takes *kwargs; name the arguments it needs: {GROUPS}"),
    ],
)
def test_refused_signatures(name, function, problem):
    (found,) = problems(module(**{name: hookimpl(function)}))
    assert problem in found


def test_specname_is_refused():
    plugin = module(my_groups=hookimpl(specname="awq_scale_groups")(lambda: []))
    assert problems(plugin) == ["my_groups uses specname; name the function awq_scale_groups instead"]


@pytest.mark.parametrize("option", ["wrapper", "hookwrapper", "trylast"])
def test_options_without_meaning_are_refused(option):
    def awq_scale_groups():
        yield

    plugin = module(awq_scale_groups=hookimpl(**{option: True})(awq_scale_groups))
    (found,) = problems(plugin)
    assert f"uses {option}" in found and "awq_core.hooks.defaults.awq_scale_groups" in found


def test_tryfirst_is_harmless():
    assert problems(module(awq_architectures=hookimpl(tryfirst=True)(lambda: []))) == []


def test_optionalhook_is_left_for_a_newer_core():
    newer = hookimpl(optionalhook=True)(lambda anything: [])
    assert problems(module(awq_architectures=hookimpl(lambda: []), awq_future_hook=newer)) == []


def test_generators_and_coroutines_are_refused():
    def generator():
        yield 1

    async def coroutine():
        return []

    for function in (generator, coroutine):
        (found,) = problems(module(awq_architectures=hookimpl(function)))
        assert "no yield, no async" in found


def test_missing_marker_is_reported():
    assert "awq_architectures lacks the marker" in problems(module(awq_architectures=lambda: []))[0]
    (found,) = problems(module(awq_scale_group=lambda: []))
    assert "lacks the @hookimpl marker and is not a hook; did you mean 'awq_scale_groups'?" in found


def test_marker_of_another_project_is_reported():
    from pluggy import HookimplMarker

    assert "lacks the marker" in problems(module(awq_architectures=HookimplMarker("awq_core")(lambda: [])))[0]


def test_what_is_no_function_cannot_be_a_hook():
    partial = hookimpl(functools.partial(lambda x: [], 1))
    assert "on a plain function" in problems(module(awq_architectures=partial))[0]


def test_marker_above_staticmethod_is_reported():
    """pluggy 1.6 would ignore it, 1.7 would register it."""

    class Plugin:
        @hookimpl
        @staticmethod
        def awq_architectures():
            return []

    assert "below any @staticmethod" in problems(Plugin())[0]


def test_imported_modules_and_private_helpers_are_left_alone():
    import awq_core

    plugin = module(awq_core=awq_core, _awq_helper=lambda: 0, helper=lambda x=1: 0, awq_version="1.0")
    plugin.awq_architectures = hookimpl(lambda: [])
    assert problems(plugin) == []


def test_unrelated_properties_are_not_evaluated():
    class Plugin:
        @property
        def expensive(self):
            raise AssertionError("evaluated")

        @hookimpl
        def awq_architectures(self):
            return []

    assert problems(Plugin()) == []


def test_every_problem_is_listed_once(manager):
    plugin = module(
        awq_scale_group=hookimpl(lambda: []),
        awq_layer_stacks=hookimpl(lambda arch, model=None: []),
    )
    with pytest.raises(PluginError) as caught:
        manager.register(plugin, "acorn", "awq-plugin-acorn", "1.2")
    assert caught.value.message == (
        "plugin 'acorn' (awq-plugin-acorn 1.2) not loaded: "
        "awq_layer_stacks gives 'model' a default; write 'model' without one: awq_layer_stacks(arch, model); "
        "awq_scale_group is not a hook; did you mean 'awq_scale_groups'?"
    )
    assert manager.plugins == ()


def test_registering_twice(manager, plugin):
    acorn = plugin("acorn")
    manager.register(acorn, "acorn")
    with pytest.raises(PluginError, match="the name 'acorn' is taken"):
        manager.register(plugin("acorn"), "acorn")
    with pytest.raises(PluginError, match="registered already, as 'acorn'"):
        manager.register(acorn, "oak")
    assert [info.name for info in manager.plugins] == ["acorn"]


def test_unhashable_plugin_is_refused(manager):
    """pluggy keeps plugins in sets; one that cannot be hashed would fail the calls of every other plugin."""
    plugin = types.SimpleNamespace(awq_architectures=hookimpl(lambda: []))
    with pytest.raises(PluginError, match="unhashable"):
        manager.register(plugin, "acorn")
