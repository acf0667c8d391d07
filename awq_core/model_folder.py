"""A model's folder and configuration: where it is, what config.json says, and which plugin claims it.

    name or folder --resolve--> folder --raw_config--> config.json --claims--> owner --load_config--> configuration

Ownership is decided by config.json as it is, before transformers reads it: a plugin may bring the classes that reading
it takes.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from awq_core.errors import CheckpointError, ConfigError, PluginError, UnsupportedModelError
from awq_core.hooks.manager import Owner, PluginManager


class Claim:
    """The two fields of a raw config.json that ownership is decided by."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.model_type = raw.get("model_type", "")
        self.architectures = raw.get("architectures") or []


def resolve(model: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The local folder of `model`: itself if it is one, else a snapshot of that name from the Hugging Face hub.

    Args:
        model: local folder or hub name ("org/name").
        weights: False fetches the JSON files only, which is all a plan needs.

    Raises:
        CheckpointError: neither a folder nor a name the hub (or the local cache) has.
    """
    path = Path(model)
    if path.is_dir():
        return path
    text = str(model)
    if path.is_absolute() or text.startswith(".") or text.count("/") > 1 or path.exists():
        raise CheckpointError(f"{text}: no such model folder", hint="give a folder with config.json, or a hub name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{text}: not a folder, and the hub did not answer: {reason}", hint="check the path or the network"
        ) from error


def raw_config(folder: Path) -> dict[str, Any]:
    """`config.json` as it is written.

    Raises:
        CheckpointError: missing or not JSON.
    """
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json", hint="is this a transformers model folder?") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}", hint="download the file again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: not a JSON object", hint="download the file again")
    return raw


def open_config(
    folder: Path, manager: PluginManager, *, plugin: str | None = None, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, Owner]:
    """The typed configuration and the plugin that owns the model; imports the plugin's `auto_module` first.

    Raises:
        UnsupportedModelError, PluginConflictError: see `PluginManager.owner`.
        ConfigError: the model needs its own code and `trust_remote_code` was not given.
        PluginError: the plugin's `auto_module` cannot be imported.
    """
    raw = raw_config(folder)
    owner = manager.owner(Claim(raw), plugin)
    import_auto_module(owner)
    return load_config(folder, trust_remote_code=trust_remote_code), owner


def claimant(raw: dict[str, Any], manager: PluginManager, plugin: str | None = None) -> Owner | None:
    """The owner of a model that is only run, its Auto classes registered; None where no plugin claims it, and
    transformers alone can build it.

    Args:
        raw: its config.json.
        plugin: the owner that was named.

    Raises:
        UnsupportedModelError: `plugin` does not claim the model.
        PluginError, PluginConflictError: see `PluginManager.owner`.
    """
    try:
        owner = manager.owner(Claim(raw), plugin)
        import_auto_module(owner)
    except UnsupportedModelError:
        if plugin is not None:
            raise
        return None
    return owner


def import_auto_module(owner: Owner) -> None:
    """Import the module by which a plugin registers its own configuration and model class, where it names one.

    Raises:
        PluginError: the import fails.
    """
    name = owner.arch.auto_module
    try:
        if name:
            importlib.import_module(name)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise PluginError(
            f"{owner.label}: auto_module {name} cannot be imported: {type(error).__name__}: {reason}",
            hint="AWQ_DEBUG=1 shows the traceback",
        ) from error


def load_config(folder: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """`AutoConfig` for a local folder, with remote code off unless asked for."""
    raw = raw_config(folder)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if raw.get("auto_map") and not trust_remote_code:
            raise ConfigError(
                f"{folder}: this model brings its own Python code",
                hint="read it, then pass trust_remote_code=True (--trust-remote-code)",
            ) from error
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}/config.json: {line}", hint="does transformers know this model_type?"
        ) from error
