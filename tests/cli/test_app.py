"""The program as a whole: commands load lazily, every failure is one line and the right exit code."""

import json
import subprocess
import sys
import types

import click
import importlib_metadata
import pytest

from awq_core import __version__, errors
from awq_core.cli import app
from awq_core.cli.output import print_json

HEAVY = {"torch", "transformers", "datasets", "rich", "safetensors", "yaml"}
SCRIPT = """
import sys
from awq_core.cli import main
sys.argv = ["awq", *{arguments!r}]
try:
    main()
finally:
    print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""


def run_python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)


def loaded(arguments, modules):
    """Which of `modules` a run of the program has imported."""
    done = run_python("-c", SCRIPT.format(arguments=arguments, heavy=modules))
    assert done.returncode == 0 and done.stdout, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plugins", "list"], *([name, "--help"] for name in sorted(app.COMMANDS))], ids=" ".join
)
def test_what_needs_no_torch_imports_none(arguments):
    assert loaded(arguments, HEAVY) == "[]"


def test_listing_the_commands_imports_none_of_them(awq):
    assert loaded(["--help"], {module for module, _, _ in app.COMMANDS.values()}) == "[]"
    listed = awq("--help").stdout
    assert all(f"{name} " in listed and text in listed for name, (_, _, text) in app.COMMANDS.items())


def commands():
    """(name, command) of every command that does something, groups opened."""
    context = click.Context(app.cli)
    for name in app.cli.list_commands(context):
        command = app.cli.get_command(context, name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", command.commands[sub]) for sub in sorted(command.commands))
        else:
            yield name, command


def test_every_command_has_json_examples_and_help():
    for name, command in commands():
        assert "--json" in {option for param in command.params for option in param.opts}, name
        assert "Examples:\n" in command.epilog and f"awq {name}" in command.epilog, name
        assert command.help, name
        undescribed = [param.name for param in command.params if isinstance(param, click.Option) and not param.help]
        assert not undescribed, (name, undescribed)


def test_both_programs_are_the_same():
    scripts = importlib_metadata.distribution("awq-core").entry_points.select(group="console_scripts")
    assert {(script.name, script.value) for script in scripts} == {
        ("awq", "awq_core.cli:main"),
        ("awq-cli", "awq_core.cli:main"),
    }


def test_version_as_a_module():
    assert run_python("-m", "awq_core.cli", "--version").stdout == f"awq {__version__}\n"


@pytest.fixture
def failing(monkeypatch):
    """failing(function): `awq fail` runs it."""

    def install(function):
        module = types.ModuleType("awq_failing")
        module.fail = click.command("fail")(click.option("--json", "as_json", is_flag=True)(function))
        monkeypatch.setitem(sys.modules, "awq_failing", module)
        monkeypatch.setitem(app.COMMANDS, "fail", ("awq_failing", "fail", "Fails."))

    return install


def raising(error):
    def function(as_json):
        raise error

    return function


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.CheckpointError, 1),
        (errors.CalibrationError, 1),
        (errors.OutputError, 1),
        (errors.NumericsError, 1),
        (errors.ConfigError, 2),
        (errors.UnsupportedModelError, 3),
        (errors.PluginConflictError, 3),
        (errors.PluginError, 4),
        (errors.PlanError, 4),
    ],
)
def test_a_failure_is_one_line_and_its_exit_code(kind, code, failing, awq, read_json):
    failing(raising(kind("the shard\nis short", hint="download\nit again")))
    result = awq("fail", code=code)
    assert result.stderr == "awq: error: the shard is short - try: download it again\n"
    assert result.stdout == ""
    result = awq("fail", "--json", code=code)
    assert read_json(result) == {"error": "the shard is short", "hint": "download it again", "exit_code": code}
    assert result.stderr == "awq: error: the shard is short - try: download it again\n"


def test_a_failure_without_a_hint(failing, awq):
    failing(raising(errors.CheckpointError("no such folder")))
    assert awq("fail", code=1).stderr == "awq: error: no such folder\n"


def test_a_surprise_says_how_to_see_more(failing, awq, read_json, monkeypatch):
    failing(raising(ValueError("not 7")))
    result = awq("fail", "--json", code=1)
    assert result.stderr == "awq: error: ValueError: not 7 - try: set AWQ_DEBUG=1 for the traceback\n"
    assert read_json(result)["error"] == "ValueError: not 7"
    monkeypatch.setenv("AWQ_DEBUG", "1")
    result = awq("fail", code=1)
    assert "Traceback" in result.stderr and "raise error\nValueError: not 7" in result.stderr
    assert result.errors[-1].startswith("awq: error: ValueError: not 7")


def test_a_command_that_cannot_be_imported(awq, monkeypatch):
    monkeypatch.setitem(app.COMMANDS, "fail", ("awq_no_such_module", "fail", "Fails."))
    assert awq("fail", code=1).stderr.startswith("awq: error: ModuleNotFoundError: No module named 'awq_no_such")


def test_interrupted(failing, awq, read_json):
    failing(raising(KeyboardInterrupt()))
    result = awq("fail", "--json", code=130)
    assert result.stderr == "awq: interrupted\n"
    assert read_json(result) == {"error": "interrupted", "hint": "", "exit_code": 130}


def test_a_document_that_tells_of_the_failure_stays_the_only_one(failing, awq, read_json):
    def function(as_json):
        print_json({"healthy": False, "loss": float("nan")})
        raise errors.PluginError("not healthy")

    failing(function)
    result = awq("fail", "--json", code=4)
    assert read_json(result) == {"healthy": False, "loss": None}
    assert result.stderr == "awq: error: not healthy\n"


def test_usage_errors_are_clicks_own(awq, read_json):
    result = awq("quantize", "--json", code=2)
    assert read_json(result) == {"error": "Missing argument 'MODEL'.", "hint": "", "exit_code": 2}
    assert "Usage: " in result.stderr
    assert "Did you mean 'quantize'?" in awq("qantize", code=2).stderr
    assert "No such command 'xyzzy'.\n" in awq("xyzzy", code=2).stderr


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "awq_core.cli", "plugins", "list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    errors_seen = process.stderr.read()
    process.wait(timeout=60)
    assert "Traceback" not in errors_seen and "Exception" not in errors_seen and "awq: error" not in errors_seen


def test_plugins_list_is_json_in_a_process_of_its_own():
    done = run_python("-m", "awq_core.cli", "plugins", "list", "--json")
    assert done.returncode == 0
    assert isinstance(json.loads(done.stdout), list)
