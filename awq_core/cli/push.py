"""`awq push`: a quantized folder becomes a repository on the Hugging Face hub.

    list what is in DIR  ->  refuse what must not leave  ->  repository  ->  huggingface_hub's upload_folder

Uploading is huggingface_hub's: files the hub has are not sent again, so the same command goes on after a broken
connection. What may leave is decided here, by what a checkpoint consists of: a file that is no part of one stops the
command, since what is once published stays published.
"""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

import click

from awq_core.cli.options import json_option
from awq_core.cli.output import note, one_line, plural, print_json
from awq_core.errors import CheckpointError, ConfigError, OutputError
from awq_core.sizes import size_text

# By suffix: weights, settings and tokenizers, the card with its pictures, the report.
SENT = {
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
    ".tiktoken",
    ".yaml",
    ".md",
    ".html",
    ".svg",
    ".png",
    ".jpg",
}
NAMED = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY", ".gitattributes")
SKIPPED = (".git", ".cache")  # of git and of huggingface_hub itself: neither refused nor sent
UNFINISHED = ".awq-partial"
SHOWN = 4  # files that a message names


@click.command(
    epilog="""\b
Examples:
  awq push DIR org/name --dry-run
  awq push DIR org/name --private
  awq push DIR org/name --revision v2 --token-env MY_TOKEN
\b
Interrupted, the same command goes on where it was. HF_ENDPOINT names another hub.
"""
)
@click.argument("folder", metavar="DIR")
@click.argument("repo", metavar="REPO")
@click.option("--private", is_flag=True, help="Make the repository private; refused where a public one is there.")
@click.option("--revision", metavar="NAME", help="Branch to push to, made if it is not there.  [default: main]")
@click.option("--dry-run", is_flag=True, help="List what would be sent, and send nothing.")
@click.option(
    "--token-env",
    metavar="NAME",
    help="Environment variable with the access token.  [default: HF_TOKEN, or the login of the hf program]",
)
@json_option
def push(
    folder: str, repo: str, private: bool, revision: str | None, dry_run: bool, token_env: str | None, as_json: bool
) -> None:
    """Send the quantized model in DIR to the repository REPO of the Hugging Face hub."""
    sizes = files_to_send(Path(folder))
    check_name(repo)
    check_weights(Path(folder))
    token = None if token_env is None else os.environ.get(token_env)
    if token_env is not None and not token:
        raise ConfigError(f"the environment has no {token_env}", hint="leave --token-env out to use hf's login")
    url = "" if dry_run else send(Path(folder), list(sizes), repo, private=private, revision=revision, token=token)
    if as_json:
        files = [{"name": name, "bytes": size} for name, size in sizes.items()]
        about = {"repo": repo, "revision": revision or "main", "private": private, "dry_run": dry_run, "url": url}
        print_json({**about, "files": files, "bytes": sum(sizes.values())})
        return
    for name, size in sizes.items():
        click.echo(f"{size_text(size):>9}  {name}")
    where = f"{repo}{f', revision {revision}' if revision else ''}"
    what = f"{plural(len(sizes), 'file')}, {size_text(sum(sizes.values()))}"
    note(
        f"{what} {'would be sent' if dry_run else 'are'} {'to' if dry_run else 'in'} {where}{f': {url}' if url else ''}"
    )


def files_to_send(folder: Path) -> dict[str, int]:
    """Size of every file to send, by its name in the folder.

    Raises:
        CheckpointError: not a quantized folder.
        ConfigError: an unfinished run, or a file that is no part of a checkpoint.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json there", hint="name a quantized folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json: {one_line(str(error))}") from error
    if not isinstance(config, dict) or not config.get("quantization_config"):
        raise CheckpointError(f"{folder} is not quantized", hint=f"awq quantize {folder} --out DIR")
    if (folder / UNFINISHED).exists():
        raise ConfigError(f"{folder} holds an unfinished run ({UNFINISHED})", hint="finish or remove it first")
    code = bool(config.get("auto_map"))  # the model's own Python code is part of it where its config says so
    sizes: dict[str, int] = {}
    refused: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if name.parts[0] in SKIPPED or (path.is_dir() and not path.is_symlink()):
            continue
        inside = path.is_file() and path.resolve().is_relative_to(folder.resolve())
        if inside and may_leave(name, code=code):
            sizes[name.as_posix()] = path.stat().st_size
        else:
            refused.append(name.as_posix())
    if refused:
        more = f" and {len(refused) - SHOWN} more" if len(refused) > SHOWN else ""
        raise ConfigError(
            f"{folder} holds what is no part of a checkpoint: {', '.join(refused[:SHOWN])}{more}",
            hint="move it out of the folder; nothing was sent",
        )
    return sizes


def may_leave(name: Path, *, code: bool) -> bool:
    """Whether a file belongs to a published checkpoint: by its name, nothing hidden, no pickle, no temporary file."""
    if name.name.startswith(NAMED):
        return True
    if any(part.startswith(".") for part in name.parts) or name.name.endswith((".tmp", "~")):
        return False
    return name.suffix.lower() in SENT or (code and name.suffix == ".py")


def check_name(repo: str) -> None:
    """Raises ConfigError for what cannot be the name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo}: {one_line(str(error))}", hint="org/name") from error


def check_weights(folder: Path) -> None:
    """Raises CheckpointError for a shard that is missing, truncated or corrupt: the headers say so."""
    from awq_core.checkpoint.reader import CheckpointReader

    CheckpointReader(folder).close()


def send(folder: Path, names: list[str], repo: str, *, private: bool, revision: str | None, token: str | None) -> str:
    """Make the repository and its branch where they are not there, and upload; returns the commit's address.

    Raises:
        ConfigError: `private`, and the repository is there and public.
        OutputError: the hub refused, or could not be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        full = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(full).private:
            raise ConfigError(f"{full} is there already and public", hint="make it private on the hub, or another REPO")
        if revision:
            api.create_branch(full, branch=revision, exist_ok=True)
        # The names themselves as patterns: what appears in the folder meanwhile is not sent.
        commit = api.upload_folder(
            repo_id=full,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="AWQ checkpoint",
        )
    except ConfigError:
        raise
    except Exception as error:  # of huggingface_hub, of its HTTP library, of the system
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        code = getattr(getattr(cause, "response", None), "status_code", None)
        again = "run the same command again: what has arrived is not sent twice"
        hint = "is the token one that may write? hf auth login, or --token-env" if code in (401, 403) else again
        raise OutputError(f"{repo}: {one_line(str(cause))[:300] or type(cause).__name__}", hint=hint) from error
    return str(commit.commit_url)
