"""Plugins made on the spot: as modules in memory (`plugin`), and as installed distributions in a folder (`site`)."""

import sys
import textwrap
import types
from pathlib import Path

import importlib_metadata
import pytest

from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl
from awq_core.hooks.manager import PluginManager, reset_default_manager


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """The environment of whoever runs the tests must not steer them."""
    for variable in ("AWQ_PLUGINS", "AWQ_PLUGIN_PREFER", "AWQ_STRICT_PLUGINS", "AWQ_TRACE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    reset_default_manager()
    yield
    reset_default_manager()


@pytest.fixture
def architecture():
    """architecture("acorn", model_types=...): an `Architecture` with one stack and one group."""

    def make(family="acorn", **fields):
        fields.setdefault("model_types", (family,))
        fields.setdefault("stacks", (LayerStack(component="language", blocks=f"{family}.layers"),))
        fields.setdefault("scale_groups", (ScaleGroup(prev="norm", layers=("q",)),))
        return Architecture(family=family, **fields)

    return make


@pytest.fixture
def plugin(architecture):
    """plugin("acorn", awq_layer_stacks=function, ...): a module whose functions are marked as hooks. Unless told
    otherwise it claims the model type of its name."""

    def make(name="acorn", *architectures, **functions):
        module = types.ModuleType(name)
        declared = architectures or (architecture(name),)
        functions.setdefault("awq_architectures", lambda: declared)
        for hook, function in functions.items():
            setattr(module, hook, hookimpl(function))
        return module

    return make


@pytest.fixture
def manager():
    """A manager that sees nothing that is installed."""
    return PluginManager(allow=(), core_version="0.1.0")


@pytest.fixture
def config():
    """config("acorn", "AcornForCausalLM"): what `PluginManager.owner` reads of a transformers configuration."""
    return lambda model_type, *classes: types.SimpleNamespace(model_type=model_type, architectures=list(classes))


class Site:
    """A folder of installed distributions: real modules and real metadata, read by importlib_metadata."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.modules: list[str] = []

    def add(self, family, source=None, *, dist=None, version="1.0", requires=(), model_types=None, module=None):
        """Install a plugin. `source` is the module's text; without it, a good plugin that claims `model_types`."""
        dist = dist or f"awq-plugin-{family}"
        module = module or dist.replace("-", "_")
        if source is None:
            source = f"""
                from awq_core.hooks import Architecture, LayerStack, hookimpl

                @hookimpl
                def awq_architectures():
                    stack = LayerStack(component="language", blocks="model.layers")
                    return [Architecture(family={family!r}, model_types={model_types or (family,)!r}, stacks=(stack,))]
            """
        self.monkeypatch.delitem(sys.modules, module, raising=False)  # a real plugin of this name
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {one}\n" for one in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n{needs}")
        (info / "entry_points.txt").write_text(f"[awq.plugins]\n{family} = {module}\n")
        self.modules.append(module)

    def entry_points(self):
        found = []
        for dist in importlib_metadata.distributions(path=[str(self.folder)]):
            found.extend(dist.entry_points.select(group="awq.plugins"))
        return found

    def load(self, *, allow=None, core_version="0.1.0"):
        manager = PluginManager(allow=allow, core_version=core_version)
        manager.load_entry_points(entry_points=self.entry_points())
        return manager


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    site = Site(folder, monkeypatch)
    yield site
    for module in site.modules:
        sys.modules.pop(module, None)
