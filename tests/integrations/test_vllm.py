"""The vLLM plugin, with a stand-in for vLLM: silent unless asked, one line if asked, never an error."""

import importlib.metadata
import itertools
import logging
import sys
import types

import pytest

from awq_core.integrations import vllm as plugin


@pytest.fixture
def fake(monkeypatch):
    """fake({"awq_marlin": True, "awq": False}): vLLM with these methods, and whether each claims an AWQ checkpoint."""

    def install(methods):
        readers = {
            name: type(
                f"Config_{name}",
                (),
                {"override_quantization_method": classmethod(lambda c, s, u, n=name, y=claims: n if y else None)},
            )
            for name, claims in methods.items()
        }
        names = ("vllm", "vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.quantization")
        modules = [types.ModuleType(name) for name in names]
        modules[0].__version__ = "0.99"
        for parent, child in itertools.pairwise(modules):
            setattr(parent, child.__name__.rpartition(".")[2], child)
        modules[-1].QUANTIZATION_METHODS = list(readers)
        modules[-1].get_quantization_config = readers.__getitem__
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_it_does_nothing_unless_asked(monkeypatch, caplog):
    monkeypatch.delenv(plugin.SWITCH, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would raise
    plugin.register()
    monkeypatch.setenv(plugin.SWITCH, "0")
    plugin.register()
    assert not caplog.records


@pytest.mark.parametrize(
    "methods, reader",
    [
        ({"awq_marlin": True, "awq": False}, "Config_awq_marlin (awq_marlin)"),
        ({"awq_marlin": False, "awq": False}, "Config_awq (awq)"),
        ({"auto_awq": True, "awq_marlin": True, "awq": False}, "Config_auto_awq (auto_awq)"),
    ],
)
def test_it_says_what_will_read(fake, monkeypatch, caplog, methods, reader):
    monkeypatch.setenv(plugin.SWITCH, "1")
    fake(methods)
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    assert [record.getMessage() for record in caplog.records] == [
        f"awq-core: vLLM 0.99 reads AWQ checkpoints with {reader}; nothing is replaced"
    ] * 2


def test_another_vllm_is_no_error(fake, monkeypatch, caplog):
    monkeypatch.setenv(plugin.SWITCH, "1")
    fake({})
    plugin.register()
    assert "cannot tell" in caplog.text


def test_vllm_would_find_it():
    points = {p.name: p.value for p in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "awq_core" not in points:
        pytest.skip("the installation is older than the entry point: pip install -e . again")
    assert points["awq_core"] == "awq_core.integrations.vllm:register"
