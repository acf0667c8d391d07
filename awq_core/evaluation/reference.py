"""The original's logits on disk, so that one pass over it serves every candidate made of it.

    DIR/<key>/0000.safetensors   {"logits": [window, vocabulary]} of the first window, in the dtype the model gave them
    DIR/<key>/entry.json         what it is of, for people
    DIR/<key>.json               a number measured on the original, such as its perplexity

The logits are kept as they come, all of them: a divergence from the cache equals one from the model to the last bit.
Keeping the likeliest few and the sum of the others would be a hundred times smaller and is no KL divergence: what the
candidate does to the others is lost. The price is 2 bytes a token and vocabulary entry, 33 MB for 512 tokens of a
vocabulary of 32,000 in bf16; `limit` bounds the folder, and the entries that were not used for longest go first.

The key is a hash of the original's fingerprint, the token ids of every window (so of text, tokenizer and protocol), the
device and the versions of torch and of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from awq_core.checkpoint.reader import fingerprint
from awq_core.errors import ConfigError, OutputError
from awq_core.evaluation.perplexity import evaluating, logits_of
from awq_core.model_folder import resolve
from awq_core.version import __version__

LIMIT = 20_000_000_000
ENTRY = "entry.json"
KEY = re.compile(r"[0-9a-f]{64}")


class ReferenceLogits:
    """An original model, or what is left of it on disk; `divergence` takes it in place of the model.

    Args:
        model: folder or hub name of the original.
        folder: of the cache; made where it is not there.
        load: opens the original; called where something of it is not there, and at most once.
        device: what it would run on, for the key.
        limit: bytes of logits that the cache may hold.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        folder: str | os.PathLike[str],
        load: Callable[[], Any],
        *,
        device: str = "cpu",
        limit: int = LIMIT,
    ) -> None:
        self.name, self.folder, self.limit, self.device = os.fspath(model), Path(folder), limit, device
        self._load, self._model = load, None
        self._fingerprint = ""
        self._entry = self.folder

    @property
    def model(self) -> Any:
        """The original itself, opened when it is first asked for."""
        if self._model is None:
            self._model = self._load()
        return self._model

    @property
    def opened(self) -> bool:
        """Whether the original had to be opened."""
        return self._model is not None

    def key(self, *parts: str | bytes) -> str:
        """Name of something measured on this model with these settings."""
        self._fingerprint = self._fingerprint or fingerprint(resolve(self.name))
        digest = hashlib.sha256()
        for part in (self._fingerprint, self.device, torch.__version__, __version__, *parts):
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def remember(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Plain values by their key: from disk, else measured and kept.

        Raises:
            OutputError: the cache's folder cannot be written.
        """
        path = self.folder / f"{key}.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict):
                return values
        except (OSError, ValueError):
            pass  # not there, or cut short by a crash
        values = measure()
        self._write(path, json.dumps(values).encode())
        return values

    def begin(self, windows: torch.Tensor) -> None:
        """Say which windows `[windows, window]` of token ids are meant.

        Raises:
            OutputError: the cache's folder cannot be written.
        """
        count, length = windows.shape
        ids = windows.contiguous().to(torch.int64).view(torch.uint8).numpy().tobytes()
        self._entry = self.folder / self.key("logits", f"{count} x {length}", ids)
        about = {"model": Path(self.name).name, "windows": count, "window": length}
        self._write(self._entry / ENTRY, json.dumps(about).encode())  # its age is when it was last used

    def logits(self, number: int, ids: torch.Tensor, windows: int) -> torch.Tensor:
        """Logits `[tokens, vocabulary]` of the `ids` `[tokens]` of window `number`: from disk, else of the model.

        Raises:
            ConfigError: all windows would need more than the limit.
            OutputError: the disk is full, or cannot be read.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save

        path = self._entry / f"{number:04}.safetensors"
        if path.is_file():
            try:
                return load_file(path)["logits"]
            except (SafetensorError, KeyError, OSError):  # damaged: it is made again
                path.unlink(missing_ok=True)
        with evaluating(self.model):
            found = logits_of(self.model, ids).cpu().contiguous()
        if not number:
            self._make_room(found.numel() * found.element_size(), windows)
        self._write(path, save({"logits": found}))
        return found

    def _make_room(self, size: int, windows: int) -> None:
        if size * windows > self.limit:
            fits = self.limit // size
            raise ConfigError(
                f"the original's logits of {windows} windows are {size * windows / 1e9:.2g} GB, the cache's limit is "
                f"{self.limit / 1e9:.2g} GB",
                hint=f"--max-windows {fits}, or a larger --cache-limit" if fits else "a larger --cache-limit",
            )
        entries = [path for path in self.folder.iterdir() if KEY.fullmatch(path.name) and (path / ENTRY).is_file()]
        others = sorted((path for path in entries if path != self._entry), key=lambda p: (p / ENTRY).stat().st_mtime)
        held = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
        for path in others:
            if sum(held.values()) + size * windows <= self.limit:
                break
            shutil.rmtree(path)
            del held[path]

    def _write(self, path: Path, data: bytes) -> None:
        """The file whole or not at all."""
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            hint = "free space, fewer --max-windows, or another --cache folder"
            raise OutputError(f"{path.parent} cannot be written: {error.strerror}", hint=hint) from error
        finally:
            with suppress(OSError):
                part.unlink()
