"""Where calibration samples come from: one name, read lazily, whatever stands behind it.

    None                      the Python standard library's own source: on every machine, no network
    "notes.txt", "a.jsonl"    a file; also .jsonl.zst and .parquet
    "corpus/"                 every text and data file below a folder, by name; hidden and binary files are left out
    "photos/"                 images with captions: metadata.jsonl ({"file_name", "text"}), or cat.jpg beside cat.txt
    "org/name:config"         a dataset on the Hugging Face hub, streamed; "pileval" is the one the AWQ papers use,
                              "wikitext2" and "c4" those that papers measure on
    ["text", ...]             strings, rows, chats or lists of token ids: any iterable, such as a `datasets.Dataset`

A sample is a dictionary: {"text": str}, {"messages": [...]} or {"input_ids": [...]}, with "images" where there are any,
and "pile_set_name" where the row says which subset of a mixed corpus it is of.
AWQ needs little data (128 windows of 512 tokens), but of the kind the model will meet.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from awq_core.calibration.formats import (
    Sample,
    first_line,
    json_rows,
    open_image,
    read_file,
    reading,
    sample_text,
    to_sample,
)
from awq_core.calibration.subsets import SUBSET, Subsets
from awq_core.errors import CalibrationError

T = TypeVar("T")
Source: TypeAlias = "str | os.PathLike[str] | Iterable[Any] | None"

STANDARD_LIBRARY = "Python standard library source (built-in default)"
GIVEN = "samples given by the caller"
ALIASES = {
    "pileval": "mit-han-lab/pile-val-backup",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
    "c4": "allenai/c4:en",
}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
DATA_SUFFIXES = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".zst", ".parquet")
DATASET_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
SHUFFLE_BUFFER = 1000
# Smaller modules are mostly aliases and constants.
SMALLEST_MODULE = 4096


def read_samples(
    source: Source = None,
    *,
    split: str | None = None,
    text_column: str | None = None,
    shuffle: bool = False,
    seed: int = 0,
    subsets: Subsets | None = None,
) -> Iterator[Sample]:
    """Samples of a source, one at a time; nothing is read ahead.

    Args:
        source: see the top of this file.
        split: of a hub dataset; by default "train", or the first there is. Local sources have none.
        text_column: the column that holds text or messages, where its name is not one of the usual.
        shuffle: visit the files of a folder, or a hub dataset (through a buffer), in an order drawn from `seed`.
            A single file, a list and the default are read in their own order.
        seed: for `shuffle`.
        subsets: read only these subsets of a corpus whose rows have `meta.pile_set_name`.

    Raises:
        CalibrationError: no such source (at once); unreadable, malformed or empty (while reading).
    """
    order_seed = seed if shuffle else None
    samples: Iterator[Sample]
    if source is None:
        samples, name = standard_library(), STANDARD_LIBRARY
    elif isinstance(source, (str, os.PathLike)):
        path, name = local_path(source), os.fspath(source)
        if path is None:
            samples = _hub(name, split, text_column, order_seed)
        elif path.is_dir():
            samples = _folder(path, text_column, order_seed)
        else:
            samples = read_file(path, text_column)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping):
        samples, name = (to_sample(item, f"item {i} of the data", text_column) for i, item in enumerate(source)), GIVEN
    else:
        hint = "a path, a dataset name or a list of texts; of a dictionary of splits, one split"
        raise CalibrationError(f"{type(source).__name__} is no calibration source", hint=hint)
    if subsets:
        samples = subsets.select(samples, name)
    return _not_empty(samples, name)


def describe_source(source: Source) -> str:
    """How a model card names a source, without the folders of this machine: "corpus.jsonl", "dataset org/name"."""
    if source is None:
        return STANDARD_LIBRARY
    if not isinstance(source, (str, os.PathLike)):
        return GIVEN
    path = local_path(source)
    if path is None:
        return f"Hugging Face dataset {ALIASES.get(os.fspath(source), os.fspath(source))}"
    return path.resolve().name


def read_text(source: Source, *, split: str | None = None, text_column: str | None = None) -> str:
    """All documents of a source as one string, joined by a blank line as WikiText's protocol has it.

    A plain text file comes back unchanged. Raises: CalibrationError, as `read_samples`.
    """
    path = local_path(source) if isinstance(source, (str, os.PathLike)) else None
    rows = path is None or path.is_dir() or path.name.lower().endswith((".jsonl", ".ndjson", ".zst", ".parquet"))
    samples = read_samples(source, split=split, text_column=text_column)
    return ("\n\n" if rows else "").join(sample_text(sample) for sample in samples)


def local_path(source: str | os.PathLike[str]) -> Path | None:
    """The existing file or folder that `source` names, or None where it can only be a hub dataset.

    Raises:
        CalibrationError: it looks like a path and nothing is there.
    """
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    if name and os.path.exists(path):
        return path
    looks_local = isinstance(source, os.PathLike) or name.startswith(".") or name.lower().endswith(DATA_SUFFIXES)
    if looks_local or not DATASET_NAME.fullmatch(name):
        raise CalibrationError(
            f"no such file or folder of text: {name[:200]!r}", hint="give a path, or a dataset as org/name"
        )
    return None


def standard_library(exclude: Iterable[str] = ()) -> Iterator[Sample]:
    """The top-level modules of Python's standard library, one a sample, in a fixed order unrelated to the alphabet.

    The order sorts by a hash of the name, so a Python that adds or drops modules keeps the order of the others.

    Args:
        exclude: modules to leave out ("socket" or "socket.py"), for texts that a measurement is made on.

    Raises:
        CalibrationError: this Python comes without its source.
    """
    left_out = {name.removesuffix(".py") for name in exclude}
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = [path for path in root.glob("*.py") if path.stem not in left_out and not path.stem.startswith("_")]
    modules = [path for path in modules if path.stat().st_size >= SMALLEST_MODULE]
    if not modules:
        raise CalibrationError("this Python has no standard library source to calibrate on", hint="pass --calib FILE")
    modules.sort(key=lambda path: hashlib.sha256(path.stem.encode()).digest())
    for path in modules:
        yield from read_file(path)


def _not_empty(samples: Iterator[Sample], name: str) -> Iterator[Sample]:
    found = False
    for sample in samples:
        contents = (value for key, value in sample.items() if key != SUBSET)
        found = found or any(bool(value.strip() if isinstance(value, str) else value) for value in contents)
        yield sample
    if not found:
        raise CalibrationError(f"{name} holds no text", hint="give a file or folder with text in it")


def _folder(folder: Path, text_column: str | None, seed: int | None) -> Iterator[Sample]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    metadata = folder / "metadata.jsonl"
    with reading(metadata):
        rows = list(json_rows(metadata)) if metadata in files else []
    if rows and "file_name" in rows[0][0]:
        yield from _metadata_images(folder, _ordered(rows, seed), text_column)
    elif any(path.with_suffix(".txt").is_file() for path in images):
        yield from _captioned_images(_ordered(images, seed))
    elif images and images == files:
        hint = 'add metadata.jsonl ({"file_name": "cat.jpg", "text": "a cat"}), or cat.txt beside cat.jpg'
        raise CalibrationError(f"{folder} holds images without captions", hint=hint)
    else:
        for path in _ordered(files, seed):
            if path.name.lower().endswith((".zst", ".parquet")) or not _is_binary(path):
                yield from read_file(path, text_column)


def _ordered(items: list[T], seed: int | None) -> list[T]:
    return items if seed is None else random.Random(seed).sample(items, len(items))


def _is_binary(path: Path) -> bool:
    with reading(path), path.open("rb") as stream:
        return b"\0" in stream.read(8192)


def _metadata_images(folder: Path, rows: list[tuple[dict[str, Any], str]], text_column: str | None) -> Iterator[Sample]:
    for row, where in rows:
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise CalibrationError(f"{where} has no file_name", hint='{"file_name": "cat.jpg", "text": "a cat"}')
        # normpath, not resolve: the hub's own cache keeps its files as links to elsewhere.
        if not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder)):
            raise CalibrationError(f"{where}: file_name {name!r} leaves the folder", hint="name files inside it")
        yield {**to_sample(row, where, text_column), "images": [open_image(folder / name)]}


def _captioned_images(images: list[Path]) -> Iterator[Sample]:
    for path in images:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise CalibrationError(f"{path} has no caption", hint=f"write it to {caption.name} beside it")
        yield {"text": "".join(piece["text"] for piece in read_file(caption)).strip(), "images": [open_image(path)]}


def _hub(name: str, split: str | None, text_column: str | None, seed: int | None) -> Iterator[Sample]:
    repo, _, config = ALIASES.get(name, name).partition(":")
    import datasets

    try:
        data = datasets.load_dataset(repo, config or None, split=split, streaming=True)
        if split is None:
            data = data["train"] if "train" in data else next(iter(data.values()))
        if seed is not None:
            data = data.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        for number, row in enumerate(data):
            yield to_sample(row, f"dataset {name} row {number}", text_column)
    except CalibrationError:
        raise
    except Exception as error:  # network, authentication, unknown names and configurations: each has its own family
        problem, hint = first_line(error), "check the name, or pass a local file"
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            problem, hint = "HF_HUB_OFFLINE is set and it is not in the cache", "unset it, or pass a local file"
        message = f"no file or folder {name!r}, and as a Hugging Face dataset it cannot be read: {problem}"
        raise CalibrationError(message, hint=hint) from error
