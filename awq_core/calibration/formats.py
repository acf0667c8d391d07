"""One file, or one row, as samples: {"text": str}, {"messages": [...]} or {"input_ids": [...]}, with optional "images".

Files are streamed: JSON lines and Parquet row by row, a text file in pieces of a megabyte cut at a line's end, so a
file larger than memory can calibrate a model from its first pages. What a row means is read from its columns:

    text | content                  -> text
    messages | conversations        -> a chat (role/content, or ShareGPT's from/value)
    prompt + completion             -> text, or a chat where both are lists of messages
    input_ids                       -> token ids, without those that attention_mask marks as padding
    image | images                  -> pictures, beside any of these
    meta.pile_set_name              -> the subset of a mixed corpus, beside any of these (`subsets`)

Every failure names the file and the place in it: the line of a bad JSON object, the byte that is not UTF-8.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from awq_core.calibration.compressed import open_bytes
from awq_core.calibration.subsets import SUBSET, subset_of
from awq_core.errors import CalibrationError

Sample = dict[str, Any]

PIECE = 1 << 20
TEXT_COLUMNS = ("text", "messages", "conversations", "content", "input_ids")
PAIR = ("prompt", "completion")
IMAGE_COLUMNS = ("image", "images")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def to_sample(value: Any, where: str, text_column: str | None = None) -> Sample:
    """One sample from a row (mapping of columns), a string, a chat (list of messages) or a list of token ids.

    Args:
        value: the row or value.
        where: what error messages call it ("calib.jsonl line 3").
        text_column: the column to read; without it, the first of the accepted ones.

    Raises:
        CalibrationError: no such column, or a value that is none of these.
    """
    if not isinstance(value, Mapping):
        return _from_value(value, where)
    names = (text_column,) if text_column else TEXT_COLUMNS
    column = next((name for name in names if name in value), None)
    if column is not None:
        sample = _from_value(value[column], f"{where}, column {column!r},")
        if "input_ids" in sample and value.get("attention_mask") is not None:
            pairs = zip(sample["input_ids"], value["attention_mask"], strict=True)
            sample = {"input_ids": [token for token, kept in pairs if kept]}
    elif text_column is None and all(name in value for name in PAIR):
        first, second = (value[name] or "" for name in PAIR)
        if isinstance(first, str) != isinstance(second, str):
            raise CalibrationError(f"{where}: prompt and completion are not both text, nor both messages")
        sample = _from_value(first + second if isinstance(first, str) else [*first, *second], where)
    else:
        missing = f"no column {text_column!r}" if text_column else "no text column"
        raise CalibrationError(
            f"{where} has {missing}; its columns: {', '.join(map(str, value)) or 'none'}",
            hint=f"rename one to 'text', or pass text_column; accepted: {', '.join(TEXT_COLUMNS)}, {' + '.join(PAIR)}",
        )
    if (subset := subset_of(value)) is not None:
        sample[SUBSET] = subset
    pictures = _pictures(value)
    return {**sample, "images": pictures} if pictures else sample


def _from_value(value: Any, where: str) -> Sample:
    if value is None or isinstance(value, str):
        return {"text": value or ""}
    items = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(items, (list, tuple)) and items:
        if all(isinstance(item, Mapping) for item in items):
            return {"messages": [_message(item, where) for item in items]}
        if all(isinstance(item, int) for item in items):
            return {"input_ids": list(items)}
    if isinstance(items, (list, tuple)) and not items:
        return {"text": ""}
    raise CalibrationError(
        f"{where} is {type(value).__name__}, which is not text", hint="text, a list of messages, or a list of token ids"
    )


def _message(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    # Arrow fills the keys that only other messages have with None, which chat templates would take for present.
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        message["role"] = SHAREGPT_ROLES.get(message["from"], message["from"])
        message["content"] = message.get("value", "")
    if "role" not in message:
        raise CalibrationError(f"{where} has a message without a role", hint='{"role": "user", "content": "..."}')
    message.setdefault("content", "")
    return {key: item for key, item in message.items() if key not in ("from", "value")}


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    """The decoded images of a row: PIL images as they are, Parquet's {"bytes": ...} opened; paths are left alone."""
    values = row.get("images") or [row.get("image")]
    if not isinstance(values, (list, tuple)):
        values = [values]
    opened = [
        open_image(io.BytesIO(value["bytes"])) if isinstance(value, Mapping) and value.get("bytes") else value
        for value in values
    ]
    return [image for image in opened if hasattr(image, "convert")]


def open_image(file: Path | IO[bytes]) -> Any:
    """A picture as RGB PIL image.

    Raises:
        CalibrationError: pillow is not installed, or the file is missing or no picture.
    """
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("reading images needs pillow", hint="pip install awq-core[vision]") from None
    name = str(file) if isinstance(file, Path) else "an image of the data"
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise CalibrationError(f"no such image: {name}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise CalibrationError(f"{name} is not a readable image: {first_line(error)}") from error


def sample_text(sample: Mapping[str, Any]) -> str:
    """The words of a sample: its text, or the contents of its messages joined by newlines."""
    if "messages" not in sample:
        return str(sample.get("text", ""))
    contents = (message["content"] for message in sample["messages"])
    parts = ([content] if isinstance(content, str) else content for content in contents)
    words = (part if isinstance(part, str) else part.get("text") for content in parts for part in content)
    return "\n".join(word for word in words if word)


def read_file(path: Path, text_column: str | None = None) -> Iterator[Sample]:
    """Samples of one file, by its name: .jsonl, .jsonl.zst, .parquet, anything else UTF-8 text (.zst: compressed).

    Raises:
        CalibrationError: unreadable, damaged, not UTF-8 (with the byte), bad JSON (with the line), no text column.
    """
    kind = path.name.lower().removesuffix(".zst")
    with reading(path):
        if path.name.lower().endswith(".parquet"):
            yield from _parquet(path, text_column)
        elif kind.endswith((".jsonl", ".ndjson")):
            for row, where in json_rows(path):
                yield to_sample(row, where, text_column)
        else:
            yield from _pieces(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever reading `path` raises into one CalibrationError that names the file."""
    try:
        yield
    except CalibrationError:
        raise
    except UnicodeDecodeError:
        raise CalibrationError(
            f"{path} is not UTF-8: byte {_bad_byte(path)}", hint="convert it, e.g. iconv -f LATIN1 -t UTF-8"
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror or first_line(error)}") from error
    except Exception as error:  # pyarrow and zstandard have exception families of their own
        raise CalibrationError(f"{path} cannot be read: {first_line(error)}") from error


def json_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON-lines file, each with its place ("calib.jsonl line 3"); blank lines are skipped."""
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise CalibrationError(f"{where} is not a JSON object", hint='one {"text": "..."} a line')
            yield row, where


def _pieces(path: Path) -> Iterator[Sample]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as stream:
        while piece := stream.read(PIECE):
            yield {"text": piece + stream.readline(PIECE)}


def _parquet(path: Path, text_column: str | None) -> Iterator[Sample]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        to_sample(dict.fromkeys(names), str(path), text_column)  # refuses a file without text, listing all its columns
        known = {text_column} if text_column else {*TEXT_COLUMNS, *PAIR}
        known |= {*IMAGE_COLUMNS, "meta", SUBSET}
        columns = [name for name in names if name in known]
        number = 0
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for row in batch.to_pylist():
                yield to_sample(row, f"{path} row {number}", text_column)
                number += 1


def _bad_byte(path: Path) -> int:
    """Offset (in the decompressed file) of the first byte that is not UTF-8."""
    offset, tail = 0, b""
    with open_bytes(path) as stream:
        while chunk := stream.read(PIECE):
            data = tail + chunk
            try:
                _, used = codecs.utf_8_decode(data, "strict", False)
            except UnicodeDecodeError as error:
                return offset + error.start
            offset, tail = offset + used, data[used:]
    return offset


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
