"""A file's bytes, decompressed on the way where its name ends in .zst.

zstandard's own stream reader ends without a word where a file is cut short, so half a download would pass for a whole
one. Here the file is taken frame by frame, and a last frame without its end is an error.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from awq_core.errors import CalibrationError

CHUNK = 1 << 17


def open_bytes(path: Path) -> IO[bytes]:
    """A readable binary stream of the file's (decompressed) content.

    Raises:
        CalibrationError: zstandard is not installed. Reading raises EOFError where a compressed file is cut short.
    """
    if not path.name.lower().endswith(".zst"):
        return path.open("rb")
    try:
        import zstandard
    except ImportError:
        raise CalibrationError(f"{path} is compressed", hint="pip install awq-core[zstd]") from None
    return io.BufferedReader(_Pieces(_decompressed(path, zstandard.ZstdDecompressor())), CHUNK)


def _decompressed(path: Path, decompressor: Any) -> Iterator[bytes]:
    frame = None
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            while chunk:  # a chunk may end one frame and begin the next, as in files written in parallel
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame:
        raise EOFError("the file is cut short")


class _Pieces(io.RawIOBase):
    """An iterator of byte strings as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces, self._left = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size] = self._left[:size]
        self._left = self._left[size:]
        return size
