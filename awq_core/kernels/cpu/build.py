"""Compile `w4a16.cpp` once for this machine, keep the library in the user's cache folder, load it with ctypes.

    $XDG_CACHE_HOME/awq/w4a16-<key>.so  (or ~/.cache/awq/...),      key = SHA-256(sources, flags, compiler, its version)

A library is code, so it is loaded only where nobody else can have put it: the folder and all above it belong to this
user or to root and cannot be written by others. Its last 32 bytes are the SHA-256 of the rest (the loader of programs
ignores what follows the program), so half a file is never loaded but compiled again. Every process compiles into a
folder of its own and renames the result into place: two at once do the work twice and both end with a whole file.

OpenMP's functions are left open when linking. The C library finds them in the OpenMP that torch has loaded, so there is
one pool of threads and `torch.set_num_threads` holds for both.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

SOURCES = ("w4a16.cpp", "w4a16.h", "w4a16_amx.h")  # the first is compiled
# As /proc/cpuinfo spells them -> as the compiler does.
NEEDED = {
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512_bf16": "-mavx512bf16",
    "fma": "-mfma",
}
TILES = {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"}
COMPILE = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno")
SECONDS = 120
DIGEST = 32


class BuildError(Exception):
    """Why there is no library, in one line."""


@dataclass(frozen=True, slots=True)
class Library:
    """What was loaded.

    Attributes:
        functions: the C functions of the source.
        path: where the file lies.
        tiles: whether AMX was compiled in.
        compiler: the first line of what it says of itself.
    """

    functions: ctypes.CDLL
    path: Path
    tiles: bool
    compiler: str


@functools.cache
def library() -> Library | str:
    """The loaded library, or why there is none. Asked once a process; only a failed compilation is printed."""
    try:
        flags = machine_flags()
        compiler, version = find_compiler()
        folder = cache_folder()
    except BuildError as error:
        return str(error)
    try:
        return _load_or_compile(folder, compiler, version, flags)
    except BuildError as error:
        print(f"the C++ kernel is not used: {error}", file=sys.stderr)
        return str(error)


def machine_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Compiler flags for what this CPU has.

    Raises:
        BuildError: not Linux, or the CPU lacks something the source needs.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BuildError("needs Linux on x86-64 with AVX512-BF16") from error
    line = next((line for line in lines if line.startswith("flags")), "")
    has = set(line.partition(":")[2].split())
    lacking = [name for name in NEEDED if name not in has]
    if lacking:
        raise BuildError(f"this CPU has no {', '.join(lacking)}")
    tiles = tuple(TILES.values()) if has >= set(TILES) else ()
    return (*NEEDED.values(), *tiles)


def find_compiler() -> tuple[str, str]:
    """(path, version) of `$CXX`, g++ or c++.

    Raises:
        BuildError: there is none that runs.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "c++"):
        path = shutil.which(name)
        if path:
            return path, _run([path, "--version"]).partition("\n")[0].strip()
    raise BuildError(f"no C++ compiler: {named} (CXX) is not there" if named else "no C++ compiler: install g++")


def cache_folder() -> Path:
    """The folder for compiled libraries, made where it is missing, readable by this user only.

    Raises:
        BuildError: it cannot be made, or others could put something there.
    """
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # The specification has relative paths ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    folder = root / "awq"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = folder.resolve(strict=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
        for part in (folder, *folder.parents):
            _private(part, part.stat())
    except OSError as error:
        raise BuildError(f"no cache folder: {folder}: {error.strerror}; XDG_CACHE_HOME names another place") from error
    return folder


def _private(path: Path, status: os.stat_result) -> None:
    """Only this user or root can change what `path` names; in a sticky folder others cannot touch what is ours."""
    writers = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if writers == stat.S_IWGRP and _own_group(status.st_gid):
        writers = 0
    if (writers and not status.st_mode & stat.S_ISVTX) or status.st_uid not in (0, os.getuid()):
        raise BuildError(f"others can write to {path}, so nothing is loaded from it; XDG_CACHE_HOME can move it")


def _own_group(gid: int) -> bool:
    """Whether a group has nobody else in it: many systems give each user one by the same name."""
    import grp  # neither is there on Windows, where this is not reached
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False
    return group.gr_name in (user, "root") and not set(group.gr_mem) - {user, "root"}


def _load_or_compile(folder: Path, compiler: str, version: str, flags: tuple[str, ...]) -> Library:
    sources = {name: resources.files(__package__).joinpath(name).read_bytes() for name in SOURCES}
    parts = (*sources.values(), *(part.encode() for part in (*COMPILE, *flags, compiler, version)))
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    path = folder / f"w4a16-{key}.so"
    if not _whole(path):
        _compile(sources, path, [compiler, *COMPILE, *flags])
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    return Library(functions, path, set(TILES.values()) <= set(flags), version)


def _whole(path: Path) -> bool:
    """Whether the file is there, is ours, and ends with the digest of the rest."""
    try:
        status = path.lstat()
        data = path.read_bytes()
    except OSError:
        return False
    if not stat.S_ISREG(status.st_mode):
        return False
    _private(path, status)
    return hashlib.sha256(data[:-DIGEST]).digest() == data[-DIGEST:]


def _compile(sources: dict[str, bytes], path: Path, command: list[str]) -> None:
    """Compile in a folder of this process, seal with the digest, rename into place."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as name:
            work = Path(name)
            for source, text in sources.items():
                (work / source).write_bytes(text)
            item, made = work / "w4a16.o", work / "w4a16.so"
            _run([*command, "-c", str(work / SOURCES[0]), "-o", str(item)])
            _run([command[0], "-shared", str(item), "-o", str(made)])  # no -fopenmp: see above
            with made.open("ab") as file:
                file.write(hashlib.sha256(made.read_bytes()).digest())
            os.replace(made, path)
    except OSError as error:
        raise BuildError(f"cannot write {path}: {error.strerror}") from error


def _run(command: list[str]) -> str:
    """Output of a command; BuildError with its first line of complaint where it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, env=environment, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed: {' '.join(said.split())}")
    return done.stdout
