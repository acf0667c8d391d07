"""The house rules, read from the source: which floor may import which, what the core must not know or do."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest

import awq_core

ROOT = Path(awq_core.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# From the top down; a module may import its own floor and those below. The longest name that fits decides.
FLOORS = (
    ("awq_core.cli", "awq_core.testing"),  # the conformance kit uses everything
    (
        "awq_core.api",
        "awq_core.compat",
        "awq_core.components",
        "awq_core.identity",
        "awq_core.model_card",
        "awq_core.recipe",
        "awq_core.report",
        "awq_core.scaffold",
    ),
    (
        "awq_core.quantization",
        "awq_core.runtime",
        "awq_core.evaluation",
        "awq_core.export",
        "awq_core.inference",
        "awq_core.integrations",
    ),
    ("awq_core.calibration", "awq_core.checkpoint", "awq_core.kernels", "awq_core.modules"),
    (
        "awq_core.planning",
        "awq_core.plan_types",
        "awq_core.passes",
        "awq_core.output_head",
        "awq_core.allocation",
        "awq_core.mixed",
        "awq_core.units",
        "awq_core.scale_groups",
        "awq_core.shared_heads",
        "awq_core.skeleton",
        "awq_core.model_folder",
    ),
    ("awq_core.hooks",),
    ("awq_core.config", "awq_core.errors", "awq_core.devices", "awq_core.gemm", "awq_core.sizes", "awq_core.version"),
)
# The package itself imports its public names lazily, on behalf of whoever asks; it holds nothing else.
PACKAGE = "awq_core"

# Whole words of a name, split at everything that is no letter and before capitals; "opt" is not in "option".
FAMILIES = {
    *("llama", "mistral", "mixtral", "ministral", "qwen", "gemma", "falcon", "phi", "opt", "bloom", "mpt", "gpt"),
    *("gptj", "gptneox", "neox", "codegen", "deepseek", "cohere", "granite", "olmo", "jamba", "mamba", "bamba"),
    *("baichuan", "internlm", "internvl", "chatglm", "glm", "ernie", "exaone", "hunyuan", "idefics", "llava", "molmo"),
    *("minicpm", "nemotron", "paligemma", "pixtral", "smollm", "smolvlm", "stablelm", "starcoder", "yi", "aquila"),
    *("clip", "siglip", "bert", "whisper", "dbrx", "grok", "kimi", "arctic"),
}
# Words that name something else here: the clipping of a range everywhere; in one file, a role in ShareGPT's chats, and
# in another the block that so many families share that it goes by the name of the first.
FAMILIES.discard("clip")
OTHERWISE_MEANT = {
    "awq_core.calibration.formats": {'"gpt"'},
    "awq_core.export.gguf_rope": {'"llama3"'},  # a kind of rotary embedding
    "awq_core.export.gguf_sizes": {"LlamaFileType"},
    "awq_core.hooks.presets": {"LLAMA_BLOCK"},
    "awq_core.scaffold.write": {"LLAMA_BLOCK", '"presets.LLAMA_BLOCK"'},
}
# A program that goes by the name of a family; what it calls architectures and tokenizers is its own.
PROGRAM = re.compile(r"llama[._-](?:cpp|cli)|ExLlama")
TABLES = {"awq_core.hooks.suggestions", "awq_core.export.gguf_architectures", "awq_core.export.gguf_tokenizer"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def floor_of(module: str) -> int:
    """0 is the top. A module that no floor lists is a mistake of whoever added it."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert fitting, f"{module} is on no floor: add it to FLOORS in {Path(__file__).name}"
    return max(fitting)[1]


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Every node below `if TYPE_CHECKING:`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.body:
                found.update(ast.walk(statement))
    return found


def imports(path: Path) -> set[str]:
    """Every module a file imports at run time, wherever in the file; `from package import module` is that module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = type_checking_only(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(path).split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in MODULES else base)
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name == PACKAGE or name.startswith(PACKAGE + ".")}


# -- floors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in MODULES if name != PACKAGE])
def test_imports_run_down_the_floors(module):
    mine = floor_of(module)
    upwards = sorted(name for name in ours(MODULES[module]) - {PACKAGE} if floor_of(name) < mine)
    assert not upwards, f"{module} imports {', '.join(upwards)} from a floor above"


def test_only_the_command_line_uses_the_package_as_a_whole():
    """`import awq_core` reaches every floor, so it counts as one above all of them but the program's."""
    users = {module for module, path in MODULES.items() if PACKAGE in ours(path)}
    assert {module for module in users if floor_of(module) > floor_of("awq_core.cli")} == set()


def test_the_package_itself_imports_nothing():
    found = ours(MODULES[PACKAGE])
    assert found <= {"awq_core.version"}


def test_every_public_name_is_where_the_package_says():
    for name in awq_core.__all__:
        assert getattr(awq_core, name) is not None
    assert set(dir(awq_core)) >= {"plan", "quantize", "load", "QuantConfig", "AutoAWQForCausalLM"}
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        awq_core.quantise  # noqa: B018


def test_the_reading_of_imports_is_right(tmp_path, monkeypatch):
    """The checks above stand on `imports`: each form of import, on a file made for it."""
    path = ROOT / "runtime" / "made_up.py"
    source = """
        from typing import TYPE_CHECKING
        import awq_core.api
        from awq_core import kernels, __version__
        from ..checkpoint import reader
        from . import linear
        from .load import load
        if TYPE_CHECKING:
            from awq_core.cli import app
        def later():
            from awq_core.evaluation.perplexity import perplexity
    """
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: inspect.cleandoc(source))
    assert ours(path) == {
        "awq_core",
        "awq_core.api",
        "awq_core.kernels",
        "awq_core.checkpoint.reader",
        "awq_core.runtime.linear",
        "awq_core.runtime.load",
        "awq_core.evaluation.perplexity",
    }


# -- what the core does not know --------------------------------------------------------------------------------------


def words_of(text: str) -> set[str]:
    """LlamaForCausalLM -> {llama, for, causal, lm}; qwen2_moe -> {qwen, moe}."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", PROGRAM.sub("", text))}


def docstrings(tree: ast.Module) -> set[tuple[int, int]]:
    """Where docstrings begin: strings that stand alone as a statement."""
    return {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def names_and_strings(source: str) -> list[tuple[int, str]]:
    """(line, text) of every identifier and every string that is no docstring; comments are prose."""
    prose = docstrings(ast.parse(source))
    kinds = {tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    return [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type in kinds and token.start not in prose
    ]


def families_in(source: str, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    """ "line 7: MixtralBlock" of everything that names an architecture."""
    found = [(line, text) for line, text in names_and_strings(source) if words_of(text) & FAMILIES]
    return [f"line {line}: {text}" for line, text in found if text not in allowed]


@pytest.mark.parametrize("module", [name for name in MODULES if name not in TABLES])
def test_the_core_names_no_architecture(module):
    found = families_in(MODULES[module].read_text(encoding="utf-8"), OTHERWISE_MEANT.get(module, frozenset()))
    assert not found, f"{module} knows an architecture: {'; '.join(found)}"


def test_the_search_for_names_finds_them():
    source = '''
"""Prose about Llama."""
KNOWN = {"qwen2_moe": 1}  # as Gemma does
class MistralMlp:
    """Falcon's."""
    option = f"{KNOWN} and phi3"
    def is_mixtral(self): return "optimal clip"
'''
    assert [text.partition(":")[0] for text in families_in(source)] == ["line 3", "line 4", "line 6", "line 7"]


# -- what the core does not do ----------------------------------------------------------------------------------------


# Writes a state dict for those who ask for one, and reads it back as nobody should read another: tensors only.
PICKLES = "awq_core.export.torch_state"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled(module):
    path = MODULES[module]
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    assert not {name.split(".")[0] for name in imports(path)} & forbidden
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and module == PICKLES and ast.unparse(node.func) == "torch.load":
            assert "weights_only=True" in [ast.unparse(word) for word in node.keywords], f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            allowed = ("torch.load", "torch.save") if module == PICKLES else ()
            forbidden_calls = {"torch.load", "torch.save", "np.load", "numpy.load"} - set(allowed)
            assert ast.unparse(node) not in forbidden_calls, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            assert not {alias.name for alias in node.names} & {"load", "save"}, f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"line {node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_read_in_one_sitting(module):
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= 350, f"{lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_every_file_says_what_it_is(module):
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


def test_the_calls_say_what_they_raise():
    api = importlib.import_module("awq_core.api")
    functions = {name: getattr(api, name) for name in api.__all__ if inspect.isfunction(getattr(api, name))}
    assert {"plan", "quantize", "load"} == set(functions)
    written_here = {name for name, value in vars(api).items() if getattr(value, "__module__", "") == api.__name__}
    public = {name for name in written_here if not name.startswith("_") and inspect.isfunction(getattr(api, name))}
    assert public <= set(functions), "public, but not in __all__"
    for name, function in functions.items():
        raises = (inspect.getdoc(function) or "").partition("Raises:")[2]
        assert "Error:" in raises, f"awq_core.{name} does not say what it raises"
