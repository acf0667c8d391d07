"""The pages for authors of plugins are true: every block of code in them runs. Each page is named here once, with what
runs it; writing.md, hooks.md, testing.md and inference.md have tests of their own."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from awq_core.hooks.manager import PluginManager

spec = importlib.util.spec_from_file_location("docs_tests", Path(__file__).with_name("test_docs.py"))
docs_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(docs_tests)
blocks, files, install, put = docs_tests.blocks, docs_tests.files, docs_tests.install, docs_tests.put

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PLUGIN_DOCS = ROOT / "docs" / "plugins"
ELSEWHERE = {
    "writing.md": "tests/test_docs.py",
    "testing.md": "tests/test_docs.py",
    "hooks.md": "tests/hooks/test_documented.py",
    "inference.md": "tests/inference/test_inference.py",
}
HERE = {"tutorial.md", "footguns.md", "publishing.md", "vision.md", "moe.md", "directory.md"}


def test_every_page_is_run_somewhere():
    assert {page.name for page in PLUGIN_DOCS.glob("*.md")} == HERE | set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        text = (ROOT / test).read_text(encoding="utf-8")
        assert page in text or page.removesuffix(".md").upper() in text, f"{test} does not read {page}"


def test_every_page_is_in_the_index():
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PLUGIN_DOCS.glob("*.md") if f"(plugins/{page.name})" not in text] == []


# -- tutorial.md


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory) -> Path:
    """The tutorial's files, installed in a folder."""
    folder = tmp_path_factory.mktemp("awq-plugin-falcon")
    page = PLUGIN_DOCS / "tutorial.md"
    put(folder, files(page))
    install(folder)
    steps = [block.text for block in blocks(page) if block.language == "python" and not block.title]
    assert len(steps) == 3
    (folder / "steps.py").write_text("\n".join(steps))
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWQ_")}
    env |= {"PYTHONPATH": str(folder), "AWQ_PLUGINS": "falcon", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_the_tutorials_steps_run(tutorial):
    done = run(tutorial, "steps.py")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_tutorials_plugin_passes_the_kit(tutorial):
    done = run(tutorial, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "tests")
    assert done.returncode == 0, done.stdout[-3000:]
    where = run(tutorial, "-c", "import awq_plugin_falcon; print(awq_plugin_falcon.__file__)")
    assert where.stdout.startswith(str(tutorial)), "another plugin was tested"


def test_the_tutorial_ends_at_this_repositorys_plugin(tutorial):
    text = (tutorial / "awq_plugin_falcon" / "__init__.py").read_text()
    ours = (ROOT / "plugins" / "falcon" / "awq_plugin_falcon" / "__init__.py").read_text(encoding="utf-8")
    built, kept = types.ModuleType("built"), types.ModuleType("kept")
    exec(text, built.__dict__)
    exec(ours, kept.__dict__)
    for name in ("ONE_NORM", "TWO_NORMS", "SERIAL"):
        assert getattr(built, name) == getattr(kept, name)
    assert built.FALCON.stacks == kept.FALCON.stacks and built.FALCON.exempt == kept.FALCON.exempt


# -- the others


def python_blocks(*names: str) -> list[tuple[str, int]]:
    return [
        (name, index)
        for name in names
        for index, block in enumerate(blocks(PLUGIN_DOCS / name))
        if block.language == "python" and 'MODEL"' not in block.text  # those are for users: tests/test_docs.py's kind
    ]


@pytest.mark.parametrize(("name", "index"), python_blocks("footguns.md", "vision.md", "moe.md"))
def test_blocks_run(name, index):
    """Each by itself; one that has hooks must be taken by the manager as a plugin."""
    module = types.ModuleType("example")
    exec(compile(blocks(PLUGIN_DOCS / name)[index].text, name, "exec"), module.__dict__)
    if name != "footguns.md":
        assert PluginManager(allow=()).register(module, "example").hooks


def test_what_is_published_is_what_is_scaffolded():
    """publishing.md's pyproject.toml has the fields of the plugins here, and a workflow that is YAML."""
    by_language = {block.language: block.text for block in blocks(PLUGIN_DOCS / "publishing.md")}
    shown = tomllib.loads(by_language["toml"])
    ours = tomllib.loads((ROOT / "plugins" / "falcon" / "pyproject.toml").read_text(encoding="utf-8"))
    assert shown["project"].keys() == ours["project"].keys()
    for key in ("requires-python", "dependencies", "optional-dependencies", "license"):
        assert shown["project"][key] == ours["project"][key]
    assert shown["project"]["entry-points"] == {"awq.plugins": {"acorn": "awq_plugin_acorn"}}
    steps = yaml.safe_load(by_language["yaml"])["jobs"]["test"]["steps"]
    assert any("pytest" in step.get("run", "") for step in steps)
