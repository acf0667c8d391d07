"""The program, run in this process with one plugin that claims the tiny models, whatever is installed."""

import json
import os
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import awq_core
from awq_core import QuantConfig
from awq_core.cli.app import cli
from awq_core.hooks import Architecture, LayerStack, hookimpl, presets
from awq_core.hooks.manager import default_manager, reset_default_manager

ARCHITECTURE = Architecture(
    family="tiny",
    model_types=("llama",),
    stacks=(LayerStack(component="language", blocks="model.layers"),),
    scale_groups=presets.LLAMA_BLOCK,
)


def as_plugin(*architectures):
    module = types.ModuleType("tiny_plugin")
    module.awq_architectures = hookimpl(lambda: architectures)
    return module


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    """plugins(architecture, ...) replaces the plugin that is there at first."""
    monkeypatch.setenv("AWQ_PLUGINS", "")
    monkeypatch.delenv("AWQ_PLUGIN_PREFER", raising=False)
    monkeypatch.delenv("AWQ_DEBUG", raising=False)
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY", "OMP_WAIT_POLICY"):
        if name not in os.environ:  # what the program sets must not outlive the test
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)

    def install(*architectures):
        reset_default_manager()
        if architectures:
            default_manager().register(as_plugin(*architectures), "tiny", "awq-plugin-tiny", "1.2")

    install(ARCHITECTURE)
    yield install
    reset_default_manager()


@pytest.fixture
def awq():
    """awq("plan", folder, code=3): run the program; returns click's result with the lines of stderr as `errors`."""

    def run(*arguments, code=0):
        result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.exit_code, result.output, result.exception)
        result.errors = [line for line in result.stderr.splitlines() if line]
        return result

    return run


@pytest.fixture
def read_json():
    """read_json(result): stdout is one JSON document, by the letter of the standard."""

    def read(result):
        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(result.stdout, parse_constant=refuse)

    return read


@pytest.fixture
def corpus_file(tmp_path, corpus) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(corpus), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def quantized(llama_source, tmp_path_factory) -> Path:
    """`llama_source`, rounded to nearest in groups of 32. Never change it."""
    from awq_core.hooks.manager import PluginManager

    manager = PluginManager(allow=())
    manager.register(as_plugin(ARCHITECTURE), "tiny", "awq-plugin-tiny", "1.2")
    out = tmp_path_factory.mktemp("cli") / "quantized"
    awq_core.quantize(llama_source, out, config=QuantConfig(group_size=32, scale=False, clip="none"), manager=manager)
    return out
