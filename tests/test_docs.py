"""The documentation is true: its files build, its commands run and print what is shown, its links lead somewhere.

A page's fenced blocks are read in order. One with `title="path"` is a file, `console` holds commands and their output,
`diff` is a change that stands for the next console block only, other `python` runs as it is."""

import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner

from awq_core.cli.app import cli
from awq_core.hooks.manager import PluginManager

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WRITING = DOCS / "plugins" / "writing.md"
NOT_OURS = {".venv", ".git", ".cache", ".pytest_cache", "demo-output", "build", "dist"}
PAGES = sorted(path for path in ROOT.rglob("*.md") if not NOT_OURS & set(path.relative_to(ROOT).parts))
READER_PAGES = [page for page in PAGES if page.name != "CHANGELOG.md"]


class Block(NamedTuple):
    language: str
    title: str
    text: str


def blocks(page: Path) -> list[Block]:
    fence = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
    return [Block(*match) for match in fence.findall(page.read_text(encoding="utf-8"))]


def files(page: Path, language: str | None = None) -> dict[str, str]:
    return {
        b.title: b.text for b in blocks(page) if b.title and b.language != "diff" and language in (None, b.language)
    }


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each `$ command` of a console block, and the lines shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    return found


# -- the tutorial and the README's plugin, from nothing to a quantized model


def install(folder: Path) -> None:
    """What `pip install -e .` would do: metadata with the entry point, written by hand (no build backend needed)."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {one}\n" for one in project["dependencies"])
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head + needs)
    points = (f"{name} = {module}\n" for name, module in project["entry-points"]["awq.plugins"].items())
    (info / "entry_points.txt").write_text("[awq.plugins]\n" + "".join(points))


def put(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


# Runs the steps in one process, so that torch is imported once. Every step prints into its own record.
DRIVER = """
import contextlib, io, json, runpy, shlex, sys
from pathlib import Path

steps, records = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])

def program(words):
    if words[0] == "awq":
        from awq_core.cli.app import cli
        return cli.main(words[1:], prog_name="awq")
    if words[0] == "python":
        return runpy.run_path(words[1], run_name="__main__") and None
    import pytest
    return sys.exit(pytest.main([*words[1:], "-p", "no:cacheprovider"]))

done = []
for kind, argument in steps:
    shown, code = io.StringIO(), 0
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            if kind == "command":
                program(shlex.split(argument))
            elif kind == "python":
                exec(compile(argument, "page", "exec"), {"__name__": "page"})
            else:  # new text of some files: the plugin is loaded again
                for name, text in argument.items():
                    Path(name).write_text(text, encoding="utf-8")
                from awq_core.hooks.manager import reset_default_manager
                reset_default_manager()
                for name in ("awq_plugin_acorn", "test_acorn"):
                    sys.modules.pop(name, None)
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            import traceback
            shown.write(traceback.format_exc())
            code = 1
    done.append([code, shown.getvalue()])
    records.write_text(json.dumps(done))
"""


class Step(NamedTuple):
    kind: str
    argument: object
    shown: list[str]
    code: int
    output: str


NOT_RUN = ("pip", "cd")
VARYING = ("awq generate", "pytest", "awq plugins list")  # a text, a time, whatever else is installed here


def steps_of(page: Path) -> list[tuple[str, object, list[str]]]:
    """What a reader of the page does, in order."""
    current, steps = files(page), []
    original: dict[str, str] = {}
    for block in blocks(page):
        if block.language == "diff":
            lines = block.text.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            assert old in current[block.title], f"the diff of {block.title} does not apply"
            original = {block.title: current[block.title]}
            steps.append(("files", {block.title: current[block.title].replace(old, new)}, []))
        elif block.language == "console":
            steps += [("command", line, shown) for line, shown in commands(block.text) if not line.startswith(NOT_RUN)]
            if original:
                steps.append(("files", original, []))
                original = {}
        elif block.language == "python" and not block.title:
            steps.append(("python", block.text, []))
    return steps


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> list[Step]:
    """The tutorial, followed in a subprocess; then the README's plugin in its place, and its own tests."""
    folder = tmp_path_factory.mktemp("awq-plugin-acorn")
    put(folder, files(WRITING))
    install(folder)
    plan = steps_of(WRITING)
    plan += [("files", files(ROOT / "README.md"), []), ("command", "awq plugins list --json", [])]
    plan += [("command", "pytest -q tests", [])]
    (folder / "steps.json").write_text(json.dumps([[kind, argument] for kind, argument, _ in plan]))
    (folder / "driver.py").write_text(DRIVER)
    env = {name: value for name, value in os.environ.items() if not name.startswith("AWQ_")}
    env |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
    run = [sys.executable, "driver.py", "steps.json", "done.json"]
    result = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    done = json.loads((folder / "done.json").read_text())
    return [Step(*step, *record) for step, record in zip(plan, done, strict=True)]


def test_the_tutorial_works(followed):
    for step in followed:
        wrong = any(line.startswith("awq: error") for line in step.shown)
        assert bool(step.code) == wrong, f"{step.argument}\n{step.output}"
    ran = " ".join(str(step.argument) for step in followed)
    for command in ("awq plugins list", "awq plan", "awq quantize", "awq generate", "awq eval", "pytest"):
        assert command in ran, f"the tutorial does not run {command}"


def without_numbers(line: str) -> str:
    return re.sub(r"[+-]?\d[\d.,]*(e[+-]\d+)?( (ms|s|B|KB|MB|GB)\b)?", "#", " ".join(line.split()))


def test_the_tutorial_shows_what_is_printed(followed):
    """Lines shown are printed, in this order. Numbers may differ where they are measured, not in a plan."""
    for step in followed:
        if str(step.argument).startswith(VARYING):
            continue
        same = str if str(step.argument).startswith(("awq plan", "awq plugins show")) else without_numbers
        printed = iter([same(line) for line in step.output.splitlines()])
        for line in filter(None, step.shown):
            assert same(line) in printed, f"{step.argument} does not print {line!r} (or not there):\n{step.output}"


def blocks_shown(followed: list[Step], program: str) -> list[str]:
    return next(step.shown for step in followed if str(step.argument).startswith(program))


def passed(text: str) -> int:
    found = re.search(r"(\d+) passed", text)
    assert found and "failed" not in text, text
    return int(found[1])


def test_both_plugins_are_installed_and_pass_their_tests(followed):
    listings = [step.output for step in followed if str(step.argument).startswith("awq plugins list")]
    assert any(line.split()[:4] == ["acorn", "awq-plugin-acorn", "0.1.0", "ok"] for line in listings[0].splitlines())
    (acorn,) = [info for info in json.loads(listings[1]) if info["name"] == "acorn"]
    assert acorn["state"] == "ok" and acorn["model_types"] == ["acorn"]
    tutorial, readme = (step.output for step in followed if str(step.argument).startswith("pytest"))
    shown, ran, readmes = (passed(text) for text in ("\n".join(blocks_shown(followed, "pytest")), tutorial, readme))
    assert shown == ran and 0 < readmes < ran  # the README's test has one configuration, the tutorial's two


def test_the_readmes_plugin_is_the_tutorials():
    """The README shows it shorter; the values are the same."""
    declared = []
    for page in (WRITING, ROOT / "README.md"):
        module = types.ModuleType("awq_plugin_acorn")
        exec(files(page)["awq_plugin_acorn/__init__.py"], module.__dict__)
        declared.append(module.awq_architectures())
    assert list(declared[0]) == list(declared[1])
    assert sum(text.count("\n") for text in files(ROOT / "README.md").values()) <= 50, "it must stay one page"


# -- the other examples of plugins, proved on the architectures they describe

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def example(page: Path, containing: str) -> types.ModuleType:
    (block,) = [b for b in blocks(page) if b.language == "python" and containing in b.text]
    module = types.ModuleType("example")
    exec(compile(block.text, str(page), "exec"), module.__dict__)
    return module


def alone(module: types.ModuleType, *others: types.ModuleType) -> PluginManager:
    manager = PluginManager(allow=())
    for one in (module, *others):
        manager.register(one, one.awq_architectures()[0].family)
    return manager


@pytest.mark.parametrize("value_heads", [4, 2])
def test_fused_query_key_value(value_heads):
    from transformers import Phi3Config

    from awq_core.quantization.proof import prove

    config = Phi3Config(**{**TINY, "num_key_value_heads": value_heads})
    manager = alone(example(WRITING, "qkv_proj"))
    proof = prove(config, manager.owner(config), manager)
    assert proof.proved and proof.groups == 8


def test_mixture_of_experts():
    import dataclasses

    from transformers import MixtralConfig

    from awq_core.config import QuantConfig
    from awq_core.planning import make_plan
    from awq_core.quantization.proof import prove
    from awq_core.skeleton import build_skeleton

    module = example(DOCS / "plugins" / "moe.md", "unstack_experts")
    config = MixtralConfig(**TINY, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    manager = alone(module)
    owner = manager.owner(config)
    assert prove(config, owner, manager).proved
    skeleton = build_skeleton(config)
    assert manager.prepare_model(owner, skeleton)
    assert make_plan(skeleton, owner, manager, QuantConfig(group_size=32)).coverage > 0.95

    groups = [dataclasses.replace(group, compensate=()) for group in owner.arch.scale_groups]
    forgotten = types.ModuleType("forgotten")
    arch = dataclasses.replace(owner.arch, scale_groups=tuple(groups))
    forgotten.awq_architectures = module.hookimpl(lambda: [arch])
    forgotten.awq_prepare_model = module.awq_prepare_model
    manager = alone(forgotten)
    assert prove(config, manager.owner(config), manager).error > 0.1


def test_vision_language():
    from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig

    import awq_plugin_llama
    from awq_core.config import QuantConfig
    from awq_core.planning import make_plan
    from awq_core.quantization.proof import prove
    from awq_core.skeleton import build_skeleton

    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = VipLlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**TINY), image_token_index=2, vision_feature_layers=[-1, -2]
    )
    module = example(DOCS / "plugins" / "vision.md", "groups_from")
    manager = alone(module, awq_plugin_llama)
    owner = manager.owner(config)
    assert prove(config, owner, manager).proved
    plan = make_plan(build_skeleton(config), owner, manager, QuantConfig(group_size=32))
    quantized = [linear.name for linear in plan.linears if linear.quantize]
    assert len(quantized) == 14 and all(".language_model." in name for name in quantized)


# -- the examples for users


@pytest.fixture
def desk(tmp_path, monkeypatch, corpus) -> Path:
    """A folder with what the examples name: MODEL, corpus.jsonl, notes.txt."""
    from transformers import LlamaConfig

    from awq_core.testing import save_tiny

    save_tiny(LlamaConfig(**{**TINY, "hidden_size": 128, "intermediate_size": 256}), tmp_path / "MODEL")
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus * 20))
    (tmp_path / "notes.txt").write_text("\n".join(corpus))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/quantize.md",
        "docs/checkpoint.md",
        "docs/loading.md",
        "docs/migrate.md",
        "docs/export.md",
        "docs/report.md",
        "docs/eval.md",
    ],
)
def test_python_examples_run(desk, name):
    import awq_core

    if name in ("docs/checkpoint.md", "docs/loading.md", "docs/export.md"):  # they look into a folder that is there
        awq_core.quantize("MODEL", "DIR", config=awq_core.QuantConfig(scale=False, clip="none"))
    done = [block.text for block in blocks(ROOT / name) if block.language == "python" and not block.title]
    assert done, "the page has no example"
    names: dict[str, object] = {}
    for text in done:
        exec(compile(text, name, "exec"), names)


def test_the_exports_shown_are_printed(desk):
    import awq_core

    awq_core.quantize("MODEL", "DIR", config=awq_core.QuantConfig(scale=False, clip="none"))
    for block in blocks(DOCS / "export.md"):
        for line, shown in commands(block.text) if block.language == "console" else ():
            printed = CliRunner().invoke(cli, shlex.split(line)[1:]).output.splitlines()
            assert [without_numbers(one) for one in printed] == [without_numbers(one) for one in shown if one], line


def test_testing_helpers_run():
    for block in blocks(DOCS / "plugins" / "testing.md"):
        if block.language == "python":
            exec(compile(block.text, "testing.md", "exec"), {})


def test_the_plan_shown_is_the_plan(monkeypatch):
    monkeypatch.chdir(ROOT)
    shown = dict(c for b in blocks(DOCS / "quantize.md") if b.language == "console" for c in commands(b.text))
    (line,) = [line for line in shown if line.startswith("awq plan examples/")]
    result = CliRunner().invoke(cli, shlex.split(line)[1:])
    here = "\nkernels here, on "  # which kernels those are differs from machine to machine
    printed, page = result.stdout.partition(here), "\n".join(filter(None, shown[line])).partition(here)
    assert printed[:2] == page[:2] and page[2]


# -- links, commands, imports, tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{target}: no such heading; there are {sorted(anchors(file))}"


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes links of them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines() -> list[tuple[str, str]]:
    """(page, command) for every `awq ...`, in blocks and in the text."""
    found = []
    for page in READER_PAGES:
        text = page.read_text(encoding="utf-8")
        lines = re.findall(r"^(?:\$ )?((?:[A-Z_]+=\S* )*awq [a-z].*)$", text, re.MULTILINE)
        for line in [*lines, *re.findall(r"`((?:[A-Z_]+=\S* )*awq [a-z][^`]*)`", text)]:
            found.append((str(page.relative_to(ROOT)), line))
    return sorted(set(found))


def parse(line: str) -> None:
    """Prove that the program takes this line: its command, its options and their values (not whether files exist)."""
    words = shlex.split(line, comments=True)
    while "=" in words[0]:
        words.pop(0)
    ends = [index for index, word in enumerate(words) if re.match(r"[<>|&;]|\.\.\.$", word)]
    words = words[1 : min(ends, default=len(words))]
    command, context = cli, click.Context(cli, info_name="awq")
    while isinstance(command, click.Group) and words:
        name = words.pop(0)
        assert command.get_command(context, name), f"no command {name!r}"
        command = command.get_command(context, name)
        context = click.Context(command, info_name=name, parent=context)
    values, _, _ = command.make_parser(context).parse_args(words)
    for param in command.params:
        if param.name in values and param.nargs != -1 and not isinstance(param.type, click.Path):
            param.type_cast_value(context, values[param.name])


@pytest.mark.parametrize("page", sorted({page for page, _ in command_lines()}))
def test_commands_exist(page):
    for source, line in command_lines():
        if source == page:
            try:
                parse(line)
            except (click.ClickException, AssertionError) as error:
                message = error.format_message() if isinstance(error, click.ClickException) else error
                pytest.fail(f"{line}: {message}")


def test_every_option_is_described():
    text = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("quantize.md", "eval.md"))
    for name in ("quantize", "plan", "eval", "compare", "components", "generate"):
        command = cli.get_command(click.Context(cli), name)
        for param in command.params:
            for option in param.opts if isinstance(param, click.Option) else ():
                assert option in ("-h", "--help") or f"`{option}" in text, f"awq {name} {option}"


@pytest.mark.parametrize("page", READER_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles_and_imports_exist(page):
    import ast
    import importlib

    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("awq_core", "transformers"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.import_module(f"{node.module}.{name.name}")


def test_public_names_are_in_the_changelog():
    import awq_core

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    missing = [name for name in awq_core.__all__ if f"`{name}" not in text and f"awq_core.{name}`" not in text]
    assert missing == []


def test_inherited_tests_are_all_described():
    from awq_core.testing import ArchitectureConformance

    text = (DOCS / "plugins" / "testing.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(test_\w+)`", text, re.MULTILINE)
    assert sorted(described) == sorted(name for name in dir(ArchitectureConformance) if name.startswith("test_"))


def test_autoawq_arguments_are_all_described():
    from awq_core import compat

    text = (DOCS / "migrate.md").read_text(encoding="utf-8")
    names = compat.IGNORED_WHEN_OPENING | compat.IGNORED_WHEN_QUANTIZING | compat.IGNORED_WHEN_LOADING
    assert sorted(name for name in names if f"`{name}`" not in text) == []


def test_model_types_in_the_readme_are_the_plugins():
    """The table of families in the README says what the plugins of this repository claim."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "plugins").glob("*/awq_plugin_*/__init__.py")):
        module = types.ModuleType(path.parent.name)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        kinds = [kind for arch in module.awq_architectures() for kind in arch.model_types]
        page = (path.parents[1] / "README.md").read_text(encoding="utf-8")
        for kind in kinds:
            assert f"`{kind}`" in text, f"README.md does not name {kind}"
            assert f"`{kind}`" in page, f"{path.parents[1].name}/README.md does not name {kind}"


def test_pages_name_no_machine():
    """Paths of somebody's machine and addresses of package hosts have no place in documentation."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|Users)/|pypi\.org|files\.pythonhosted", text), page
