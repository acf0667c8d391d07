"""The `awq` program: which commands there are, and the one place where an error becomes a line and an exit code.

A command's module is imported when the command is run, so `awq --help` and `awq plugins list` import no torch and
answer at once. Exit codes: 0 done, 1 failed, 2 usage, 3 no plugin or an ambiguous one, 4 plugin broken, 5 quality gate
failed, 130 interrupted. `AWQ_DEBUG=1` adds the traceback.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from awq_core import __version__
from awq_core.cli.output import DOCUMENT, JSON, one_line
from awq_core.errors import AwqError

INTERRUPTED = 130

# name -> (module, attribute, short help). The help is here so that listing the commands imports none of them.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "bench": ("awq_core.cli.bench", "bench", "Measure how fast a model is, and how much memory it takes."),
    "compare": ("awq_core.cli.compare", "compare", "Compare two quantized folders of one model."),
    "components": ("awq_core.cli.components", "components", "Measure what quantizing each component costs."),
    "demo": ("awq_core.cli.demo", "demo", "Quantize the example model and compare the results."),
    "eval": ("awq_core.cli.eval", "evaluate", "Perplexity of a model, and its distance from the original."),
    "export": ("awq_core.cli.export", "export", "Write a quantized folder as another tool reads it."),
    "generate": ("awq_core.cli.generate", "generate", "Continue a prompt with a model."),
    "import": ("awq_core.cli.export", "import_", "Write another toolkit's 4-bit folder as AWQ."),
    "kernels": ("awq_core.cli.kernels", "kernels", "List the int4 kernels and which run here."),
    "plan": ("awq_core.cli.plan", "plan", "Say what quantization would do to every weight."),
    "plugins": ("awq_core.cli.plugins", "plugins", "List, show and check the installed architecture plugins."),
    "quantize": ("awq_core.cli.quantize", "quantize", "Quantize a model folder to 4 bits."),
    "push": ("awq_core.cli.push", "push", "Send a quantized folder to the Hugging Face hub."),
    "report": ("awq_core.cli.report", "report", "Write a page about a quantized folder: errors, scales, quality."),
    "serve": ("awq_core.cli.serve", "serve", "Serve a model over HTTP, through vLLM or transformers."),
    "tune": ("awq_core.cli.tune", "tune", "Time the Triton kernel's choices on a GPU and keep the best."),
}


class LazyGroup(click.Group):
    """A group that imports a command when it is run, and answers every failure of one in the same way.

    Args:
        lazy: name -> (module, attribute, short help).
    """

    def __init__(self, *args: Any, lazy: Mapping[str, tuple[str, str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module, attribute, _ = self.lazy[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lazy[name][2]) for name in self.list_commands(ctx)])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.lazy and not ctx.resilient_parsing:
            near = difflib.get_close_matches(args[0], self.lazy, n=1)
            ctx.fail(f"No such command {args[0]!r}.{f' Did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, BrokenPipeError):
            raise  # a reader that went away (`awq plan M | head`) is no failure worth a word: click ends quietly
        except click.ClickException as error:
            _report_json(ctx, error.format_message(), "", error.exit_code)
            raise
        except (KeyboardInterrupt, click.Abort):
            _fail(ctx, "interrupted", "", INTERRUPTED)
        except AwqError as error:
            _fail(ctx, error.message, error.hint, error.exit_code)
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            _fail(ctx, what, "set AWQ_DEBUG=1 for the traceback", 1)


def _fail(ctx: click.Context, message: str, hint: str, code: int) -> NoReturn:
    """One line on stderr, the same as JSON on stdout where JSON was asked for, and the exit code."""
    if os.environ.get("AWQ_DEBUG", "0") not in ("", "0"):
        click.echo(traceback.format_exc(), err=True)
    kind = "" if code == INTERRUPTED else "error: "
    click.echo(one_line(f"awq: {kind}{message}{f' - try: {hint}' if hint else ''}"), err=True)
    _report_json(ctx, message, hint, code)
    ctx.exit(code)


def _report_json(ctx: click.Context, message: str, hint: str, code: int) -> None:
    """The error on stdout, unless the command's own document is there already and says what failed."""
    if ctx.meta.get(JSON) and not ctx.meta.get(DOCUMENT):
        error = {"error": one_line(message), "hint": one_line(hint), "exit_code": code}
        click.echo(json.dumps(error, ensure_ascii=False))


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
    epilog="""\b
Examples:
  awq demo
  awq plan MODEL
  awq quantize MODEL --out DIR
  awq eval DIR --against MODEL
\b
Every command takes --json. AWQ_DEBUG=1 shows tracebacks.
Exit codes: 0 done, 1 failed, 2 usage, 3 no plugin or ambiguous, 4 plugin broken,
5 quality gate failed, 130 interrupted.
""",
)
@click.version_option(__version__, prog_name="awq", message="%(prog)s %(version)s")
def cli() -> None:
    """Activation-aware 4-bit quantization (AWQ) for every architecture, through plugins."""
    # Read by libraries when they are imported, which no command's module does by itself; the user's own settings stay.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait give their core away. Spinning, the default, is several times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
