"""The plugins of this repository as a whole: the directory is current, and each module stays as short as it should."""

import io
import json
import re
import tokenize
from pathlib import Path

import pytest
from click.testing import CliRunner

from awq_core.cli.directory import COMMAND, from_source, page, pinned
from awq_core.cli.plugins import plugins
from awq_core.errors import ConfigError

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "plugins"
MODULES = sorted(SOURCES.glob("*/awq_plugin_*/*.py"))

# Lines of code of one module: a text architecture needs 30 to 80 with its docstring. A family with more than four
# wirings (GPT-2 to gpt-oss are eight) has 10 for each of the others.
MOST, WIRINGS, FOR_EACH = 80, 4, 10


def test_the_directory_is_current():
    written = (ROOT / "docs" / "plugins" / "directory.md").read_text(encoding="utf-8")
    entries = from_source(SOURCES)
    now = "\n".join(page(entries, pinned(ROOT / "constraints.txt"))) + "\n"
    assert written == now, f"run: {COMMAND} > docs/plugins/directory.md"


def test_every_plugin_is_in_it_with_all_it_claims():
    entries = {one.dist: one for one in from_source(SOURCES)}
    assert len(entries) == len(list(SOURCES.glob("*/pyproject.toml")))
    falcon = entries["awq-plugin-falcon"]
    assert falcon.family == "falcon" and falcon.core == ">=0.1, <0.2"
    assert {"falcon", "falcon_h1"} <= set(falcon.model_types) and falcon.components == ()
    assert {"projector", "vision"} <= set(entries["awq-plugin-llava"].components)


def test_the_command_on_what_is_installed():
    result = CliRunner().invoke(plugins, ["directory", "--json"])
    answer = json.loads(result.stdout)
    assert answer["tested"].keys() == {"transformers", "torch", "pluggy"}
    assert "falcon" in [one["family"] for one in answer["plugins"]]
    text = CliRunner().invoke(plugins, ["directory"]).stdout
    assert "| falcon | awq-plugin-falcon |" in text and "a test keeps it current" not in text


def test_a_folder_without_plugins(tmp_path):
    with pytest.raises(ConfigError, match=r"no \*/pyproject.toml"):
        from_source(tmp_path)


def code_lines(text: str) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    lines: set[int] = set()
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        statement = token.type == tokenize.STRING and previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.NL)
        if token.type not in layout and not (statement and token.line.lstrip().startswith(('"""', "'''"))):
            lines |= set(range(token.start[0], token.end[0] + 1))
        if token.type != tokenize.COMMENT:
            previous = token.type
    return len(lines)


def test_lines_of_code_are_counted_right():
    assert (
        code_lines(
            '"""Doc\nof two lines."""\n\n# comment\nX = (\n    1,\n)\n\n\ndef f():\n    """Doc."""\n    return X\n'
        )
        == 5
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCES)))
def test_a_plugin_is_short(path):
    text = path.read_text(encoding="utf-8")
    wirings = len(re.findall(r"\bArchitecture\(", text))
    limit = MOST + FOR_EACH * max(0, wirings - WIRINGS)
    assert code_lines(text) <= limit, f"{code_lines(text)} lines of code, {limit} for {wirings} architectures"
