"""`awq plugins list | show | doctor`: text for people, data with --json, and the exit codes."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from awq_core.cli.plugins import plugins
from awq_core.errors import ConfigError, PluginConflictError, PluginError
from awq_core.hooks import ComponentPolicy, FusedBlock, LayerStack, ScaleGroup


@pytest.fixture
def awq(manager, monkeypatch):
    """awq("list", "--json"): run a command against `manager`; returns (stdout, error raised)."""
    monkeypatch.setattr("awq_core.cli.plugins.default_manager", lambda: awq.manager)

    def run(*arguments):
        result = CliRunner().invoke(plugins, arguments)
        if result.exception is not None and result.exc_info[0] is not SystemExit:
            return result.stdout, result.exception
        assert result.exit_code == 0, result.output
        return result.stdout, None

    awq = run
    awq.manager = manager
    return run


@pytest.fixture
def rich_architecture(architecture):
    return architecture(
        "acorn",
        model_types=("acorn", "acorn_vl"),
        class_names=("AcornForCausalLM",),
        requires=("pluggy>=1",),
        auto_module="acorn.modeling",
        stacks=(
            LayerStack(component="vision", blocks="tower.layers"),
            LayerStack(component="language", blocks="model.layers", prelude=("model.pos",), groups_from="text_config"),
        ),
        scale_groups=(
            ScaleGroup(
                prev="norm",
                layers=("q", "k"),
                compensate=("router",),
                no_clip=("q",),
                observe="attn",
                norm_offset=1.0,
                prev_rows="last",
                optional=True,
            ),
        ),
        components=(ComponentPolicy(component="vision", action="quantize", bits=8, group_size=64, reason="robust"),),
        fused=(FusedBlock(match="mlp", parts=("gate", "up"), factory="acorn.fused:GateUp"),),
        exempt=("mlp.down",),
    )


def test_list(awq, site):
    site.add("acorn", version="1.2", model_types=("acorn", "acorn_moe"))
    site.add("birch", "import nothing_of_the_kind")
    awq.manager = site.load()
    out, error = awq("list")
    assert error is None
    header, acorn, birch = out.splitlines()
    assert header.split() == ["name", "distribution", "version", "state", "model", "types"]
    assert acorn.split(maxsplit=4) == ["acorn", "awq-plugin-acorn", "1.2", "ok", "acorn, acorn_moe"]
    assert birch.split(maxsplit=4)[3:] == ["broken", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"]


def test_list_json(awq, site):
    site.add("acorn")
    awq.manager = site.load()
    out, _ = awq("list", "--json")
    (info,) = json.loads(out)
    assert info == {
        "name": "acorn",
        "dist": "awq-plugin-acorn",
        "version": "1.0",
        "state": "ok",
        "error": "",
        "families": ["acorn"],
        "model_types": ["acorn"],
        "hooks": ["awq_architectures"],
    }


def test_list_without_plugins(awq):
    assert "no plugins are installed" in awq("list")[0]
    assert json.loads(awq("list", "--json")[0]) == []


def test_show(awq, plugin, rich_architecture):
    acorn = plugin("acorn", rich_architecture, awq_scale_groups=lambda: [])
    awq.manager.register(acorn, "acorn", "awq-plugin-acorn", "1.2")
    out, error = awq("show", "acorn")
    assert error is None
    assert out.splitlines() == [
        "plugin 'acorn' (awq-plugin-acorn 1.2), ok",
        "hooks: awq_architectures, awq_scale_groups",
        "",
        "architecture acorn",
        "  model types   acorn, acorn_vl",
        "  classes       AcornForCausalLM",
        "  requires      pluggy>=1 (met)",
        "  auto module   acorn.modeling",
        "  stacks        vision: tower.layers",
        "                language: model.layers; also reads model.pos; scale groups from the owner of text_config",
        "  scale groups  norm -> q, k  [not clipped: q; compensated: router; input of attn; weight + 1; last rows; "
        "optional]",
        "                decided for each model by awq_scale_groups",
        "  no group      mlp.down",
        "  components    vision: quantize (8 bits; group size 64; robust)",
        "  fused         mlp <- gate, up by acorn.fused:GateUp",
    ]


def test_show_by_distribution_and_as_json(awq, plugin, rich_architecture):
    awq.manager.register(plugin("acorn", rich_architecture), "acorn", "awq-plugin-acorn", "1.2")
    out, _ = awq("show", "awq-plugin-acorn", "--json")
    shown = json.loads(out)
    assert shown["plugin"]["name"] == "acorn"
    (arch,) = shown["architectures"]
    assert arch["scale_groups"][0]["layers"] == ["q", "k"]
    assert arch["stacks"][1]["groups_from"] == "text_config"


def test_show_default_components(awq, plugin, architecture):
    awq.manager.register(plugin("acorn", architecture("acorn")), "acorn")
    assert "components    language: quantize (default" in awq("show", "acorn")[0]


def test_show_unknown_name(awq, plugin):
    awq.manager.register(plugin("acorn"), "acorn")
    out, error = awq("show", "acron")
    assert isinstance(error, ConfigError) and error.exit_code == 2
    assert error.message.endswith("did you mean 'acorn'?") and out == ""


def test_show_broken_plugin(awq, site):
    site.add("acorn", "import nothing_of_the_kind")
    awq.manager = site.load()
    out, error = awq("show", "acorn")
    assert error is None
    assert out.startswith("plugin 'acorn' (awq-plugin-acorn 1.0), broken: ModuleNotFoundError")


def test_show_of_a_duplicate_does_not_show_the_other_one(awq, site):
    site.add("acorn", dist="aa-acorn")
    site.add("acorn", dist="zz-acorn")
    awq.manager = site.load()
    assert "architecture acorn" in awq("show", "acorn")[0]
    assert "architecture" not in awq("show", "zz-acorn")[0]


def test_doctor_healthy(awq, site):
    site.add("acorn")
    site.add("birch")
    awq.manager = site.load(allow=["acorn"])
    out, error = awq("doctor")
    assert error is None
    assert out.splitlines()[0] == "ok       plugin 'acorn' (awq-plugin-acorn 1.0)"
    assert out.splitlines()[1].startswith("blocked  plugin 'birch'")
    data = json.loads(awq("doctor", "--json")[0])
    assert data["healthy"] is True and data["conflicts"] == data["unmet"] == [] and len(data["plugins"]) == 2


def test_doctor_without_plugins(awq):
    assert awq("doctor") == ("ok  no plugins are installed\n", None)


@pytest.mark.parametrize("fault", ["broken", "incompatible"])
def test_doctor_unusable(awq, site, fault):
    if fault == "broken":
        site.add("acorn", "import nothing_of_the_kind")
    else:
        site.add("acorn", requires=("awq-core>=9",))
    awq.manager = site.load()
    out, error = awq("doctor")
    assert isinstance(error, PluginError) and error.exit_code == 4
    assert error.message == "plugins that cannot be used as they are: acorn"
    assert out.startswith(fault)
    out, error = awq("doctor", "--json")
    assert json.loads(out)["healthy"] is False and error.exit_code == 4


def test_doctor_conflict(awq, plugin, architecture, monkeypatch):
    awq.manager.register(plugin("acorn", architecture("acorn", class_names=("AcornLM",))), "acorn", "a-dist", "1.0")
    awq.manager.register(
        plugin("oak", architecture("oak", model_types=("acorn",), class_names=("AcornLM",))), "oak", "o-dist", "2.0"
    )
    out, error = awq("doctor")
    assert isinstance(error, PluginConflictError) and error.exit_code == 3
    assert "conflict  class 'AcornLM' is claimed by plugin 'acorn' (a-dist 1.0) and by plugin 'oak' (o-dist 2.0)" in out
    assert "conflict  model type 'acorn' is claimed" in out
    data = json.loads(awq("doctor", "--json")[0])
    assert data["conflicts"][1] == {"kind": "model type", "claim": "acorn", "plugins": ["acorn", "oak"]}
    monkeypatch.setenv("AWQ_PLUGIN_PREFER", "oak")
    assert awq("doctor")[1] is None


def test_doctor_duplicate(awq, site):
    site.add("acorn", dist="aa-acorn")
    site.add("acorn", dist="zz-acorn")
    awq.manager = site.load()
    out, error = awq("doctor")
    assert isinstance(error, PluginConflictError) and error.exit_code == 3
    assert "duplicate  plugin 'acorn' (zz-acorn 1.0): plugin 'acorn' (aa-acorn 1.0) has this name" in out


def test_doctor_unmet_requirement(awq, plugin, architecture):
    awq.manager.register(plugin("acorn", architecture("acorn", requires=("a-thing-nobody-has>=2",))), "acorn")
    out, error = awq("doctor")
    assert isinstance(error, PluginError) and error.exit_code == 4
    assert "unmet  plugin 'acorn': acorn needs a-thing-nobody-has>=2, a-thing-nobody-has is not installed" in out
    (unmet,) = json.loads(awq("doctor", "--json")[0])["unmet"]
    assert unmet["plugin"] == "acorn" and unmet["requires"] == "a-thing-nobody-has>=2"


def test_doctor_accepts_an_alternative_for_other_versions(awq, plugin, architecture):
    old = architecture("acorn_old", model_types=("acorn",), requires=("pluggy>=99",))
    new = architecture("acorn_new", model_types=("acorn",), requires=("pluggy>=1",))
    awq.manager.register(plugin("acorn", old, new), "acorn")
    assert awq("doctor")[1] is None
    other = architecture("oak", requires=("pluggy>=99",))  # nothing else in this plugin covers it
    awq.manager.register(plugin("oak", other, architecture("oak_moe")), "oak")
    assert awq("doctor")[1].message.endswith(": oak")


@pytest.mark.parametrize("command", [(), ("list",), ("show",), ("doctor",)])
def test_help_has_examples(awq, command):
    out, _ = awq(*command, "--help")
    assert "Examples:" in out and f"  awq plugins {' '.join(command)}" in out


def test_list_imports_no_torch(site):
    """What makes it answer in less than half a second, with a plugin to load."""
    site.add("acorn")
    code = "import sys; from awq_core.cli.plugins import plugins; plugins(['list'], standalone_mode=False); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    environment = {**os.environ, "AWQ_PLUGINS": "acorn"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site.folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "awq-plugin-acorn" in done.stdout
