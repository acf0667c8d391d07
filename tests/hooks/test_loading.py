"""Every state a plugin can be in, from real metadata on disk. One plugin never stops another."""

import os
import subprocess
import sys
import textwrap

import importlib_metadata
import pytest

from awq_core.errors import PluginError
from awq_core.hooks.loading import core_mismatch, unmet
from awq_core.hooks.manager import PluginManager, default_manager, reset_default_manager


def states(manager):
    return {info.dist: info.state for info in manager.plugins}


def test_good_plugin_is_described(site):
    site.add("acorn", version="2.1", model_types=("acorn", "acorn_moe"))
    manager = site.load()
    (info,) = manager.plugins
    assert (info.name, info.dist, info.version, info.state, info.error) == (
        "acorn",
        "awq-plugin-acorn",
        "2.1",
        "ok",
        "",
    )
    assert info.families == ("acorn",)
    assert info.model_types == ("acorn", "acorn_moe")
    assert info.hooks == ("awq_architectures",)
    assert [owner.arch.family for owner in manager.architectures] == ["acorn"]


def test_import_error_is_one_line_and_stops_nobody(site, capsys):
    site.add("acorn", "import a_module_that_does_not_exist", version="0.3.1")
    site.add("birch")
    manager = site.load()
    assert states(manager) == {"awq-plugin-acorn": "broken", "awq-plugin-birch": "ok"}
    assert capsys.readouterr().err == (
        "plugin 'acorn' (awq-plugin-acorn 0.3.1) not loaded: "
        "ModuleNotFoundError: No module named 'a_module_that_does_not_exist'\n"
    )


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("raise ValueError('first line\\nsecond line')", "ValueError: first line second line"),
        ("x = 1", "it implements no hook; known: awq_architectures"),
        ("def __dir__():\n    raise RuntimeError('no listing')", "RuntimeError: no listing"),
        (
            "from awq_core.hooks import hookimpl\n@hookimpl\ndef awq_architecture(): return []",
            "awq_architecture is not a hook; did you mean 'awq_architectures'?",
        ),
        (
            "from awq_core.hooks import hookimpl\n@hookimpl\ndef awq_architectures(): return 1 / 0",
            "awq_architectures raised ZeroDivisionError: division by zero",
        ),
        (
            "from awq_core.hooks import hookimpl\n@hookimpl\ndef awq_architectures(): return 'acorn'",
            "awq_architectures returned 'acorn'; a list or tuple of Architecture is expected",
        ),
        (
            "from awq_core.errors import AwqError\nfrom awq_core.hooks import hookimpl\n"
            "@hookimpl\ndef awq_architectures(): raise AwqError('no licence', hint='buy one')",
            "no licence (buy one)",
        ),
    ],
)
def test_broken_plugins(site, capsys, source, error):
    site.add("acorn", source)
    site.add("birch")
    manager = site.load()
    assert states(manager) == {"awq-plugin-acorn": "broken", "awq-plugin-birch": "ok"}
    assert error in manager.plugins[0].error
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and error in line
    assert [owner.plugin for owner in manager.architectures] == ["birch"]


def test_refused_plugin_leaves_no_trace(manager, plugin, architecture):
    """A plugin that fails after pluggy has registered it must not answer any hook, and its name is free again."""
    bad = plugin("acorn", architecture("acorn", requires=("not a requirement !",)), awq_layer_stacks=lambda arch: ())
    with pytest.raises(PluginError, match="no PEP 508 requirement"):
        manager.register(bad, "acorn")
    assert manager.plugins == () and manager.architectures == ()
    assert manager._pm.get_plugin("acorn") is None
    assert [impl.plugin_name for impl in manager._pm.hook.awq_layer_stacks.get_hookimpls()] == ["awq-core defaults"]
    manager.register(plugin("acorn"), "acorn")
    assert [info.state for info in manager.plugins] == ["ok"]


@pytest.mark.parametrize(
    ("requires", "core", "state"),
    [
        ("awq-core>=0.1,<0.2", "0.1.0", "ok"),
        ("awq-core>=0.1,<0.2", "0.2.0", "incompatible"),
        ("awq_core>=9", "0.1.0", "incompatible"),
        ("awq-core>=0.1", "0.2.0rc1", "ok"),
        ("awq-core>=0.1", "0.2.0.dev3", "ok"),
        ("awq-core>=9; extra == 'test'", "0.1.0", "ok"),
        ("awq-core>=9; python_version < '3'", "0.1.0", "ok"),
        ("another-thing>=9", "0.1.0", "ok"),
        ("not a requirement !", "0.1.0", "ok"),
    ],
)
def test_requirement_on_the_core(site, requires, core, state):
    site.add("acorn", requires=(requires,))
    assert states(site.load(core_version=core)) == {"awq-plugin-acorn": state}


def test_incompatible_plugin_is_not_imported(site, capsys):
    site.add("acorn", "raise RuntimeError('imported')", requires=("awq-core>=9",))
    (info,) = site.load().plugins
    assert info.state == "incompatible"
    assert info.error == "it needs awq-core>=9, this is awq-core 0.1.0"
    assert "not loaded: it needs awq-core>=9" in capsys.readouterr().err


def test_unknown_core_version_refuses_nobody():
    assert core_mismatch(["awq-core>=9"], None) == ""


def test_same_name_from_two_distributions(site, capsys):
    """The name goes to the first distribution in alphabetical order, whichever was installed first."""
    site.add("acorn", dist="zz-acorn")
    site.add("acorn", dist="aa-acorn")
    manager = site.load()
    assert states(manager) == {"aa-acorn": "ok", "zz-acorn": "duplicate"}
    assert "plugin 'acorn' (aa-acorn 1.0) has this name" in capsys.readouterr().err
    assert len(manager.architectures) == 1


def test_allow_list_chooses_between_duplicates_by_distribution(site):
    site.add("acorn", dist="aa-acorn")
    site.add("acorn", dist="zz-acorn")
    assert states(site.load(allow=["zz-acorn"])) == {"aa-acorn": "blocked", "zz-acorn": "ok"}


def test_name_registered_from_python_is_not_overridden(site, plugin):
    site.add("acorn")
    manager = PluginManager(core_version="0.1.0")
    manager.register(plugin("acorn"), "acorn")
    manager.load_entry_points(entry_points=site.entry_points())
    assert states(manager) == {"(local)": "ok", "awq-plugin-acorn": "duplicate"}


def test_two_entry_points_to_one_module(site):
    site.add("acorn")
    site.add("oak", "", dist="oak", module="oak_module")
    (site.folder / "oak-1.0.dist-info/entry_points.txt").write_text("[awq.plugins]\noak = awq_plugin_acorn\n")
    manager = site.load()
    assert states(manager) == {"awq-plugin-acorn": "ok", "oak": "broken"}
    assert "registered already, as 'acorn'" in manager.plugins[1].error


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("acorn", {"awq-plugin-acorn": "ok", "awq-plugin-birch": "blocked"}),
        ("awq-plugin-birch", {"awq-plugin-acorn": "blocked", "awq-plugin-birch": "ok"}),
        (" acorn , birch,", {"awq-plugin-acorn": "ok", "awq-plugin-birch": "ok"}),
        ("", {"awq-plugin-acorn": "blocked", "awq-plugin-birch": "blocked"}),
    ],
)
def test_AWQ_PLUGINS(site, monkeypatch, setting, expected):
    site.add("acorn")
    site.add("birch")
    monkeypatch.setenv("AWQ_PLUGINS", setting)
    assert states(site.load()) == expected


def test_blocked_plugins_are_not_imported_and_are_one_line(site, monkeypatch, capsys):
    site.add("acorn", "raise RuntimeError('imported')")
    site.add("birch", "raise RuntimeError('imported')")
    monkeypatch.setenv("AWQ_PLUGINS", "")
    site.load()
    assert capsys.readouterr().err == "plugins blocked by the allow-list (AWQ_PLUGINS): acorn, birch\n"


def test_misspelled_name_in_the_allow_list(site, monkeypatch, capsys):
    site.add("acorn")
    monkeypatch.setenv("AWQ_PLUGINS", "acron")
    site.load()
    assert "plugin 'acron' is allowed but not installed" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["import nothing_of_the_kind", None])
def test_AWQ_STRICT_PLUGINS(site, monkeypatch, fault):
    site.add("acorn", fault, requires=() if fault else ("awq-core>=9",))
    monkeypatch.setenv("AWQ_STRICT_PLUGINS", "0")
    site.load()
    monkeypatch.setenv("AWQ_STRICT_PLUGINS", "1")
    with pytest.raises(PluginError, match=r"plugin 'acorn' \(awq-plugin-acorn 1.0\) not loaded") as caught:
        site.load()
    assert caught.value.exit_code == 4


def test_strict_does_not_mind_blocked_plugins(site, monkeypatch):
    site.add("acorn", "raise RuntimeError")
    monkeypatch.setenv("AWQ_STRICT_PLUGINS", "1")
    assert states(site.load(allow=())) == {"awq-plugin-acorn": "blocked"}


def test_loading_order_is_alphabetical_whatever_the_listing(site):
    for name in ("walnut", "acorn", "birch"):
        site.add(name)
    entry_points = site.entry_points()
    for listing in (entry_points, entry_points[::-1]):
        manager = PluginManager(core_version="0.1.0")
        manager.load_entry_points(entry_points=listing)
        assert [info.name for info in manager.plugins] == ["acorn", "birch", "walnut"]


def test_loading_twice_adds_nothing(site):
    site.add("acorn")
    manager = site.load()
    manager.load_entry_points(entry_points=site.entry_points())
    assert states(manager) == {"awq-plugin-acorn": "ok"}


def test_entry_point_to_an_object(site):
    site.add(
        "acorn",
        """
        from awq_core.hooks import Architecture, LayerStack, hookimpl

        class Plugin:
            @hookimpl
            def awq_architectures(self):
                return [Architecture(family="acorn", model_types=("acorn",), stacks=())]

        plugin = Plugin()
        """,
    )
    (site.folder / "awq_plugin_acorn-1.0.dist-info/entry_points.txt").write_text(
        "[awq.plugins]\nacorn = awq_plugin_acorn:plugin\n"
    )
    assert states(site.load()) == {"awq-plugin-acorn": "ok"}


def test_entry_point_without_a_distribution():
    entry = importlib_metadata.EntryPoint("acorn", "no_such_module_here", "awq.plugins")
    manager = PluginManager(core_version="0.1.0")
    manager.load_entry_points(entry_points=[entry])
    assert states(manager) == {"(local)": "broken"}


def test_damaged_metadata_is_survived(site):
    """What an interrupted pip leaves behind: an entry point in a folder without METADATA."""
    site.add("acorn")
    site.add("birch")
    (site.folder / "awq_plugin_acorn-1.0.dist-info/METADATA").unlink()
    manager = site.load()
    assert {info.name: info.state for info in manager.plugins} == {"acorn": "broken", "birch": "ok"}
    assert "No package metadata was found" in next(info.error for info in manager.plugins if info.name == "acorn")


def test_default_manager_is_made_once(site):
    manager = default_manager()
    assert default_manager() is manager
    reset_default_manager()
    assert default_manager() is not manager


def test_installed_distributions_are_found_by_a_fresh_process(site):
    """The whole road: metadata on sys.path, `default_manager`, owner; and no torch on the way."""
    site.add("acorn")
    code = """
        import sys, types
        from awq_core.hooks.manager import default_manager
        owner = default_manager().owner(types.SimpleNamespace(model_type="acorn", architectures=None))
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        print(owner.label)
    """
    environment = {**os.environ, "AWQ_PLUGINS": "acorn"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site.folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "plugin 'acorn' (awq-plugin-acorn 1.0)\n"


@pytest.mark.parametrize("module", ["awq_core.hooks", "awq_core.hooks.manager", "awq_core.cli.plugins"])
def test_import_pulls_in_no_torch(module):
    heavy = "{'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print({heavy})"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("requirement", "why"),
    [
        ("pluggy>=1", ""),
        ("pluggy", ""),
        ("pluggy>=99", "pluggy "),
        ("a-thing-nobody-has", "a-thing-nobody-has is not installed"),
        ("a-thing-nobody-has; python_version < '3'", ""),
    ],
)
def test_unmet(requirement, why):
    assert unmet(requirement).startswith(why) and bool(unmet(requirement)) == bool(why)
