"""Who owns a model, and what a user is told when nobody does or two do."""

import itertools

import pytest

from awq_core.errors import ConfigError, PluginConflictError, PluginError, UnsupportedModelError
from awq_core.hooks.claims import Owner
from awq_core.hooks.manager import PluginManager
from awq_core.hooks.suggestions import FAMILIES, MODEL_TYPES, suggest


@pytest.fixture
def rivals(plugin, architecture):
    """Two plugins that claim model type "acorn"; one of them also claims a class."""

    def make(order=(0, 1)):
        manager = PluginManager(allow=(), core_version="0.1.0")
        both = (
            (plugin("acorn", architecture("acorn")), "acorn", "awq-plugin-acorn", "1.0"),
            (
                plugin("oak", architecture("oak", model_types=("acorn", "oak"), class_names=("OakForCausalLM",))),
                "oak",
                "oak-dist",
                "2.0",
            ),
        )
        for index in order:
            manager.register(*both[index])
        return manager

    return make


def test_owner_by_model_type(manager, plugin, config):
    manager.register(plugin("acorn"), "acorn", "awq-plugin-acorn", "1.0")
    manager.register(plugin("birch"), "birch")
    owner = manager.owner(config("acorn"))
    assert isinstance(owner, Owner)
    assert (owner.plugin, owner.dist, owner.version, owner.arch.family) == ("acorn", "awq-plugin-acorn", "1.0", "acorn")


def test_sub_configuration_without_architectures(manager, plugin, config):
    manager.register(plugin("acorn"), "acorn")
    text_config = config("acorn")
    text_config.architectures = None
    assert manager.owner(text_config).plugin == "acorn"


@pytest.mark.parametrize("order", itertools.permutations((0, 1)))
def test_exact_class_beats_model_type(rivals, config, order):
    assert rivals(order).owner(config("acorn", "OakForCausalLM")).plugin == "oak"


def test_class_alone_is_a_claim(manager, plugin, architecture, config):
    manager.register(plugin("acorn", architecture("acorn", model_types=(), class_names=("AcornLM",))), "acorn")
    assert manager.owner(config("custom", "AcornLM")).plugin == "acorn"
    with pytest.raises(UnsupportedModelError):
        manager.owner(config("custom", "AcornLMHead"))  # exact: a longer name is another class
    with pytest.raises(UnsupportedModelError):
        manager.owner(config("acorn"))


@pytest.mark.parametrize("order", itertools.permutations((0, 1)))
def test_conflict_names_both_and_how_to_choose(rivals, config, order):
    with pytest.raises(PluginConflictError) as caught:
        rivals(order).owner(config("acorn", "AcornForCausalLM"))
    assert caught.value.exit_code == 3
    assert caught.value.message == (
        "model type 'acorn' (AcornForCausalLM) is claimed by plugin 'acorn' (awq-plugin-acorn 1.0) "
        "and by plugin 'oak' (oak-dist 2.0)"
    )
    for way in ("plugin='acorn'", "--plugin acorn", "AWQ_PLUGIN_PREFER=acorn"):
        assert way in caught.value.hint


@pytest.mark.parametrize(("choice", "owner"), [("acorn", "acorn"), ("oak", "oak"), ("oak-dist", "oak")])
def test_choosing_by_argument(rivals, config, choice, owner):
    assert rivals().owner(config("acorn"), plugin=choice).plugin == owner


@pytest.mark.parametrize(("prefer", "owner"), [("acorn", "acorn"), ("birch, oak", "oak"), ("oak-dist", "oak")])
def test_choosing_by_environment(rivals, config, monkeypatch, prefer, owner):
    monkeypatch.setenv("AWQ_PLUGIN_PREFER", prefer)
    manager = rivals()
    assert manager.owner(config("acorn")).plugin == owner
    assert manager.conflicts() == ()


def test_earlier_preference_wins_and_argument_beats_it(rivals, config, monkeypatch):
    monkeypatch.setenv("AWQ_PLUGIN_PREFER", "acorn,oak")
    assert rivals().owner(config("acorn")).plugin == "acorn"
    assert rivals().owner(config("acorn", "OakForCausalLM")).plugin == "acorn"
    assert rivals().owner(config("acorn"), plugin="oak").plugin == "oak"


def test_preference_for_a_plugin_that_does_not_claim_the_model_is_ignored(rivals, config, monkeypatch):
    monkeypatch.setenv("AWQ_PLUGIN_PREFER", "acorn")
    assert rivals().owner(config("oak")).plugin == "oak"


def test_conflicts_are_listed_until_settled(rivals, monkeypatch):
    (conflict,) = rivals().conflicts()
    assert (conflict.kind, conflict.claim) == ("model type", "acorn")
    assert [owner.plugin for owner in conflict.owners] == ["acorn", "oak"]
    monkeypatch.setenv("AWQ_PLUGIN_PREFER", "oak")
    assert rivals().conflicts() == ()


def test_named_plugin_that_is_not_installed(rivals, config):
    with pytest.raises(ConfigError, match="no plugin 'acrn' is installed") as caught:
        rivals().owner(config("acorn"), plugin="acrn")
    assert caught.value.exit_code == 2 and caught.value.message.endswith("; did you mean 'acorn'?")
    with pytest.raises(ConfigError) as caught:
        rivals().owner(config("acorn"), plugin="zzz")
    assert caught.value.message == "no plugin 'zzz' is installed; installed: acorn, oak"


def test_named_plugin_that_does_not_claim_the_model(rivals, config):
    with pytest.raises(UnsupportedModelError) as caught:
        rivals().owner(config("birch"), plugin="oak")
    assert caught.value.message == "plugin 'oak' (oak-dist 2.0) does not claim model type 'birch'; it claims acorn, oak"


def test_named_plugin_that_is_broken_or_blocked(site, config):
    site.add("acorn", "import nothing_of_the_kind")
    site.add("birch")
    with pytest.raises(PluginError, match="was not loaded: ModuleNotFoundError"):
        site.load().owner(config("acorn"), plugin="acorn")
    with pytest.raises(ConfigError, match="is blocked: the allow-list has birch"):
        site.load(allow=["birch"]).owner(config("acorn"), plugin="acorn")


def test_find_prefers_the_plugin_that_loaded(site):
    site.add("acorn", dist="aa-acorn")
    site.add("acorn", dist="zz-acorn")
    manager = site.load(allow=["zz-acorn"])
    assert manager.find("acorn").dist == "zz-acorn"
    assert manager.find("aa-acorn").state == "blocked"


def test_unknown_model(site, config):
    site.add("acorn", model_types=("acorn",))
    site.add("birch", "import nothing_of_the_kind", version="0.3")
    with pytest.raises(UnsupportedModelError) as caught:
        site.load().owner(config("no_such_type", "NoSuchForCausalLM"))
    message = caught.value.message
    assert caught.value.exit_code == 3
    assert "no installed plugin claims model type 'no_such_type' (NoSuchForCausalLM)" in message
    assert "installed families: acorn" in message
    assert "plugin 'birch' (awq-plugin-birch 0.3) broken: ModuleNotFoundError: No module named" in message
    assert "plugin of your own" in caught.value.hint


def test_unknown_model_with_a_published_plugin(manager, plugin, config):
    manager.register(plugin("acorn"), "acorn")
    with pytest.raises(UnsupportedModelError) as caught:
        manager.owner(config("falcon"))
    assert caught.value.hint == "pip install awq-plugin-falcon"


def test_model_type_newer_than_the_installed_plugin(site, config):
    site.add("gemma", model_types=("gemma",))
    with pytest.raises(UnsupportedModelError) as caught:
        site.load().owner(config("gemma3_text"))
    assert caught.value.hint == "pip install --upgrade awq-plugin-gemma"


def test_no_plugins_at_all(manager, config):
    with pytest.raises(UnsupportedModelError, match="installed families: none"):
        manager.owner(config("falcon"))


def test_config_without_model_type(manager):
    with pytest.raises(UnsupportedModelError, match="claims a model without model_type"):
        manager.owner(object())


def test_broken_plugin_that_would_own_the_model_is_the_error(site, config):
    site.add("falcon", "import nothing_of_the_kind", version="0.3.1")
    with pytest.raises(PluginError) as caught:
        site.load().owner(config("falcon"))
    assert caught.value.exit_code == 4
    assert caught.value.message == (
        "model type 'falcon' needs plugin 'falcon' (awq-plugin-falcon 0.3.1), which was not loaded: "
        "ModuleNotFoundError: No module named 'nothing_of_the_kind'"
    )
    assert caught.value.hint == "pip install --upgrade awq-plugin-falcon"


def test_incompatible_plugin_that_would_own_the_model(site, config):
    site.add("falcon", requires=("awq-core>=9",))
    with pytest.raises(PluginError, match="it needs awq-core>=9") as caught:
        site.load().owner(config("falcon"))
    assert caught.value.hint == "pip install --upgrade awq-core awq-plugin-falcon"


def test_blocked_plugin_that_would_own_the_model(site, config):
    site.add("falcon")
    with pytest.raises(UnsupportedModelError) as caught:
        site.load(allow=()).owner(config("falcon"))
    assert "plugin 'falcon' (awq-plugin-falcon 1.0) is blocked" in caught.value.message
    assert caught.value.hint == "add falcon to AWQ_PLUGINS"


def test_broken_plugin_of_another_family_is_not_in_the_way(site, config):
    site.add("acorn")
    site.add("falcon", "import nothing_of_the_kind")
    assert site.load().owner(config("acorn")).plugin == "acorn"


# -- Architecture.requires


def test_requires_is_checked_when_the_model_is_resolved(manager, plugin, architecture, config):
    acorn = plugin("acorn", architecture("acorn", requires=("pluggy>=1", "a-thing-nobody-has>=2", "pluggy>=99")))
    assert manager.register(acorn, "acorn", "awq-plugin-acorn", "1.0").state == "ok"
    for choice in (None, "acorn"):
        with pytest.raises(PluginError) as caught:
            manager.owner(config("acorn"), plugin=choice)
        assert caught.value.exit_code == 4
        assert caught.value.message.startswith(
            "plugin 'acorn' (awq-plugin-acorn 1.0): acorn needs a-thing-nobody-has>=2 "
            "(a-thing-nobody-has is not installed), pluggy>=99 (pluggy "
        )
        assert caught.value.hint == "pip install 'a-thing-nobody-has>=2' 'pluggy>=99'"


def test_first_architecture_whose_requirements_are_met(manager, plugin, architecture, config):
    old = architecture("acorn_old", model_types=("acorn",), requires=("pluggy>=99",))
    new = architecture("acorn_new", model_types=("acorn",), requires=("pluggy>=1",))
    manager.register(plugin("acorn", old, new), "acorn")
    assert manager.owner(config("acorn")).arch.family == "acorn_new"
    assert manager.conflicts() == ()


def test_unmet_class_claim_does_not_fall_back_to_the_model_type(manager, plugin, architecture, config):
    """Groups for the model type would be groups for another class."""
    narrow = architecture("acorn_v2", model_types=(), class_names=("AcornV2",), requires=("pluggy>=99",))
    manager.register(plugin("acorn", narrow, architecture("acorn")), "acorn")
    assert manager.owner(config("acorn", "AcornV1")).arch.family == "acorn"
    with pytest.raises(PluginError, match="acorn_v2 needs pluggy>=99"):
        manager.owner(config("acorn", "AcornV2"))


def test_architecture_that_claims_nothing_is_refused(manager, plugin, architecture):
    with pytest.raises(PluginError, match="'acorn' claims no model"):
        manager.register(plugin("acorn", architecture("acorn", model_types=())), "acorn")


# -- the table of suggestions


def test_suggestions_are_unambiguous():
    assert len(MODEL_TYPES) == sum(len(kinds) for kinds in FAMILIES.values())
    assert set(MODEL_TYPES.values()) == {f"awq-plugin-{family}" for family in FAMILIES}


@pytest.mark.parametrize(
    ("model_type", "dist"),
    [
        ("mixtral", "awq-plugin-mistral"),
        ("gpt-sw3", "awq-plugin-gpt"),
        ("qwen3_vl_moe_text", "awq-plugin-qwen"),
        ("ernie4_5", "awq-plugin-ernie"),
        ("no_such_type", None),
        ("", None),
    ],
)
def test_suggest(model_type, dist):
    assert suggest(model_type) == dist
