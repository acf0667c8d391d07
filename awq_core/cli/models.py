"""Opening a model folder to run it: the model, its tokenizer, the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from awq_core.cli.output import one_line
from awq_core.errors import CheckpointError, ConfigError


def pick_device(device: str) -> str:
    """The device to run on.

    Raises:
        ConfigError: torch does not know it, or sees no GPU.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is not known", hint="auto, cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: this torch sees no GPU", hint="--device cpu, or a CUDA build of torch")
    return device


def check_folders(*names: str | None) -> None:
    """Say a wrong name at once, not after the first of several models was measured.

    Raises:
        CheckpointError: no folder, no hub name, or no config.json there.
    """
    from awq_core.model_folder import raw_config, resolve

    for name in names:
        if name is not None:
            raw_config(resolve(name))


def open_model(
    model: str, *, device: str, plugin: str | None = None, trust_remote_code: bool = False, fuse: bool = False
) -> Any:
    """A quantized or an ordinary model, ready to run; `device` as the user wrote it.

    Raises:
        AwqError: see `awq_core.load`.
    """
    import awq_core

    options: dict[str, Any] = {"plugin": plugin, "trust_remote_code": trust_remote_code, "fuse": fuse}
    return awq_core.load(model, device=pick_device(device), **options)


def open_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub name.

    Raises:
        CheckpointError: there is none.
    """
    from transformers import AutoTokenizer

    return _open(AutoTokenizer, model, "tokenizer", trust_remote_code)


def open_processor(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The processor of a vision-language model: its tokenizer and its image preprocessing.

    Raises:
        CheckpointError: there is none, or it takes no images.
    """
    from transformers import AutoProcessor

    processor = _open(AutoProcessor, model, "image processor", trust_remote_code)
    if getattr(processor, "image_processor", None) is None:
        raise CheckpointError(f"{model}: this model takes no images", hint="leave --image out")
    return processor


def _open(auto: Any, model: str | Path, what: str, trust_remote_code: bool) -> Any:
    from awq_core.model_folder import resolve

    folder = resolve(model)
    try:
        return auto.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ImportError...
        raise CheckpointError(
            f"{folder}: no {what} could be opened: {one_line(str(error))[:200]}",
            hint="copy the files of the original model there",
        ) from error
