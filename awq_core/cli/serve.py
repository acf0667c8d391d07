"""`awq serve`: a checkpoint behind an OpenAI-style HTTP interface, by a server that exists.

    vLLM, where it is installed     this process becomes `vllm serve DIR`
    otherwise                       transformers' own server in this process, its AWQ linears replaced by this project's

It listens on loopback unless told otherwise, since neither server asks who is there.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import click

from awq_core.cli.options import device_option, json_option, trust_option
from awq_core.cli.output import command_line, note, print_json
from awq_core.errors import AwqError, CheckpointError, ConfigError

NEEDED = ("accelerate", "fastapi", "openai", "pydantic", "uvicorn")  # by transformers' server: the extra "serve"
VLLM = "vllm.entrypoints.cli.main"
LOOPBACK = ("localhost", "::1")
# For a model that was never taught to chat: what the messages say, a line each, and nothing else.
PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}{{ '\\n' }}{% endif %}{% endfor %}"


@click.command(
    epilog="""\b
Examples:
  awq serve DIR
  awq serve DIR --port 8123 --chat-template chat.jinja
  awq serve DIR --engine vllm -- --max-model-len 4096 --gpu-memory-utilization 0.8
\b
  curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
    -d '{"model": "DIR", "messages": [{"role": "user", "content": "Name three rivers."}]}'
\b
ARGS after -- go to the server as they are. Ctrl-C ends it.
"""
)
@click.argument("model", metavar="DIR")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS]...")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 is open to the whole network.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", default=8000, help="Port to listen on.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "vllm", "transformers"]),
    default="auto",
    help="Who serves; auto is vLLM where it is installed.",
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Jinja template of a chat.  [default: the model's; if it has none, the messages' text]",
)
@device_option
@trust_option
@json_option
def serve(
    model: str,
    extra: Sequence[str],
    host: str,
    port: int,
    engine: str,
    chat_template: Path | None,
    device: str,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Serve the model in DIR over HTTP, as OpenAI's interface has it."""
    if not Path(model, "config.json").is_file():
        raise CheckpointError(f"{model}: no config.json there", hint="name a model's folder")
    engine = pick_engine(engine)
    if engine == "vllm" and device != "auto":
        raise ConfigError(
            "--device is for the transformers engine", hint="CUDA_VISIBLE_DEVICES, or --engine transformers"
        )
    if engine == "transformers" and "@" in model:
        raise ConfigError(
            f"{model}: transformers' server takes what follows @ for a revision", hint="rename the folder"
        )
    check_address(host, port)
    template = chat_template.read_text(encoding="utf-8") if chat_template else None
    plain = template is None and not has_chat_template(Path(model))
    arguments = ["serve", model, "--host", host, "--port", str(port)]
    arguments += ["--trust-remote-code"] if trust_remote_code else []
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if as_json:
        print_json({"engine": engine, "version": installed(engine), "url": url, "model": model, "plain_chat": plain})
        sys.stdout.flush()
    note(f"{engine} {installed(engine)} serves {model} at {url}; Ctrl-C ends it")
    if plain:
        note("the tokenizer has no chat template: a chat is the text of its messages; --chat-template FILE gives one")
    if not (host in LOOPBACK or host.startswith("127.")):
        note(f"whoever reaches {host} can use it: the server asks for no password")
    template = PLAIN if plain else template
    if engine == "vllm":
        become_vllm([*arguments, *(["--chat-template", template] if template else []), *extra])
    run_transformers([*arguments, *chat_arguments(template), *extra], device)


def pick_engine(engine: str) -> str:
    """ "vllm" or "transformers".

    Raises:
        ConfigError: what was asked for, or everything, is not installed.
    """
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") else "transformers"
    if engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed", hint="pip install vllm, or --engine transformers")
    missing = [name for name in NEEDED if engine == "transformers" and find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"transformers' server needs {', '.join(missing)}", hint="pip install 'awq-core[serve]', or vllm"
        )
    return engine


def installed(engine: str) -> str:
    """The version of an engine; empty where it says none. vLLM's build for CPUs is a package of another name."""
    for package in (engine, f"{engine}-cpu"):
        with suppress(PackageNotFoundError):
            return version(package)
    return ""


def check_address(host: str, port: int) -> None:
    """Find out before a model is loaded.

    Raises:
        ConfigError: nobody can listen there: the port is taken, the address is of another machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(f"{host}:{port}: {error.strerror or error}", hint="another --port or --host") from error


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer or the processor brings a template, by the files that hold one."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    for name in ("tokenizer_config.json", "processor_config.json"):
        try:
            if json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template"):
                return True
        except (OSError, ValueError, AttributeError):
            continue
    return False


def chat_arguments(template: str | None) -> list[str]:
    """How transformers' server is told a template: it passes these on to `apply_chat_template`."""
    return [] if template is None else ["--chat-template-kwargs", json.dumps({"chat_template": template})]


def become_vllm(arguments: Sequence[str]) -> NoReturn:
    """Replace this process, so that signals reach vLLM itself and nobody is left behind."""
    command = [sys.executable, "-m", VLLM, *arguments]
    note(command_line("vllm", *arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def run_transformers(arguments: Sequence[str], device: str) -> None:
    """Run `transformers serve` here until it ends.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        AwqError: the server says that an argument is wrong.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # what is served lies in a folder; no request fetches anything
    from transformers.cli.transformers import app

    from awq_core.cli.models import pick_device
    from awq_core.integrations.transformers import enable

    with enable(), one_model():
        try:
            app([*arguments, "--device", pick_device(device)], standalone_mode=False)
        except Exception as error:
            if type(error).__name__ == "Abort":  # what typer makes of Ctrl-C; its own class, not click's
                raise KeyboardInterrupt from error
            if message := getattr(error, "format_message", None):
                raise AwqError(f"transformers serve: {message()}", hint="transformers serve --help") from error
            raise


@contextmanager
def one_model() -> Iterator[None]:
    """transformers' server would load any folder that a request names, and lists the models of the hub's cache; within
    this it has the one model it was started with."""
    from transformers.cli.serving import model_manager

    original = model_manager.ModelManager

    class OneModel(original):  # type: ignore[misc, valid-type]
        def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
            return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]

        def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
            if model_id_and_revision != self.process_model_name(self.force_model):
                raise ValueError(f"this server has one model, {self.force_model}")
            return super().load_model_and_processor(model_id_and_revision, *args, **kwargs)

    model_manager.ModelManager = OneModel
    try:
        yield
    finally:
        model_manager.ModelManager = original
