"""`awq plugins new`: what it writes is formatted, reads like the other plugins, and passes its own tests at once."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import MixtralConfig, OPTConfig, PhiConfig

from awq_core import infer
from awq_core.errors import ConfigError, OutputError
from awq_core.hooks import ScaleGroup
from awq_core.scaffold import config_for_tests, write_plugin
from awq_core.scaffold.source import Call, Raw, source

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WIDTHS = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
UNLIKE = {
    "walnut": OPTConfig(**WIDTHS, ffn_dim=256, word_embed_proj_dim=128),
    "hazel": PhiConfig(**WIDTHS, intermediate_size=256),
    "cob_nut": MixtralConfig(**WIDTHS, intermediate_size=192, num_key_value_heads=2, num_local_experts=8),
}


def install(folder: Path) -> None:
    """What pip would write for an editable installation."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {one}\n" for one in project["dependencies"])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n{needs}")
    ((name, module),) = project["entry-points"]["awq.plugins"].items()
    (info / "entry_points.txt").write_text(f"[awq.plugins]\n{name} = {module}\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The three distributions, in folders of their own."""
    folders = {}
    for family, config in UNLIKE.items():
        found = infer(config, family=family)
        assert found.proved
        tiny = config_for_tests(config, found)
        folders[family] = write_plugin(family, found, tmp_path_factory.mktemp(family) / "plugin", tiny=tiny).folder
    return folders


def test_the_generated_tests_pass(written):
    for folder in written.values():
        install(folder)
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWQ_")}
    env |= {
        "AWQ_PLUGINS": ",".join(UNLIKE),  # those installed here claim the same model types
        "PYTHONPATH": os.pathsep.join(map(str, written.values())),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    tests = [str(folder / "tests") for folder in written.values()]
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=written["hazel"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "error" not in done.stdout


def test_a_module_is_short_pure_data_and_formatted(written):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    for family, folder in written.items():
        text = (folder / f"awq_plugin_{family}" / "__init__.py").read_text()
        assert 30 <= text.count("\n") <= 80
        imports = [node.module for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
        assert imports == ["awq_core.hooks"]
        if ruff:
            for command in (["check"], ["format", "--check"]):
                done = subprocess.run([ruff, *command, "."], cwd=folder, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout


def test_what_the_three_differ_in(written):
    texts = {
        family: (folder / f"awq_plugin_{family}" / "__init__.py").read_text() for family, folder in written.items()
    }
    assert 'ScaleGroup(prev="fc1", layers=("fc2",))' in texts["walnut"], "ReLU lets a scale through"
    assert '"mlp.fc2",  # it reads the output of mlp.activation_fn' in texts["hazel"]
    assert 'compensate=("mlp.gate",)' in texts["cob_nut"]
    assert 'unstack_experts(model, "mlp.experts", ("w1", "w3", "w2"))' in texts["cob_nut"]


def test_the_distribution_is_complete(written):
    folder = written["cob_nut"]
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "awq-plugin-cob-nut"
    assert project["entry-points"]["awq.plugins"] == {"cob_nut": "awq_plugin_cob_nut"}
    for name in ("README.md", "awq_plugin_cob_nut/py.typed", ".github/workflows/test.yml"):
        assert (folder / name).is_file()
    assert "$" not in (folder / "README.md").read_text()


def test_what_is_refused(written, tmp_path):
    found = infer(UNLIKE["walnut"])
    with pytest.raises(ConfigError, match="no family name"):
        write_plugin("../nut", found, tmp_path / "x")
    with pytest.raises(OutputError, match="already there"):
        write_plugin("walnut", found, written["walnut"])


# -- source


def test_source_is_what_it_says():
    value = {"a": [1, 2.5, None, True], "b": ("x",), "c": {"quote": 'it\'s "q"'}, "long": ["word" * 5] * 12}
    assert ast.literal_eval(source(value)) == value
    group = ScaleGroup(prev="norm", layers=tuple(f"attention.linear_number_{i}" for i in range(8)), norm_offset=1.0)
    assert eval(source(group), {"ScaleGroup": ScaleGroup}) == group
    assert all(len(line) <= 120 for line in source([value, group]).splitlines())


def test_comments_stand_beside_or_above():
    text = source(Call("f", (("a", (Raw('"x"', "short"), Raw('"y"', "long " * 30))),)))
    lines = text.splitlines()
    assert lines[2] == '        "x",  # short'
    assert lines[3].startswith("        # long") and lines[-3] == '        "y",'
    assert ast.literal_eval(text.removeprefix("f(\n    a=").removesuffix(",\n)")) == ("x", "y")
