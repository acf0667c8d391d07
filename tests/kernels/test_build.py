"""The compiled library: made once, checked before it is loaded, and done without where it cannot be made."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import pytest

from awq_core.kernels.cpu import build

FOUND = build.library()
WHY_NOT = FOUND if isinstance(FOUND, str) else ""
needs_library = pytest.mark.skipif(bool(WHY_NOT), reason=f"no C++ kernel here: {WHY_NOT}")
PRODUCT = """
import torch
from awq_core.checkpoint.pack import PackedLinear
from awq_core.kernels.cpu import build
from awq_core.kernels.cpu.w4a16 import W4A16Kernel
ones = torch.full((32, 1), 0x22222222, dtype=torch.int32), torch.full((1, 1), 0x11111111, dtype=torch.int32)
kernel = W4A16Kernel()
packed = PackedLinear(*ones, torch.full((1, 8), 0.5).half())
why = kernel.unsupported(packed, torch.bfloat16)
x = torch.ones(1, 32, dtype=torch.bfloat16)
print(why or kernel.linear(x, kernel.prepare(packed, x.dtype))[0, 0].item())
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a process that has loaded nothing."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "awq"
    build.library.cache_clear()


def product(**environment: str) -> subprocess.CompletedProcess[str]:
    """2 - 1 = 1, times 0.5, 32 times: "16.0" by a process of its own, or why not."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=variables, timeout=120)


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def test_the_sources_come_with_the_package():
    for name in build.SOURCES:
        assert resources.files("awq_core.kernels.cpu").joinpath(name).read_text(encoding="utf-8").startswith("//")


@needs_library
def test_it_is_compiled_once_and_kept_private(cache):
    assert product().stdout == "16.0\n"
    (made,) = libraries(cache)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache.iterdir()] == [made.name], "nothing is left over"
    before = made.stat().st_mtime_ns, made.stat().st_ino
    assert build.library().path == made, "the same key in another process"
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == before


@needs_library
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_library_is_compiled_again(cache, damage):
    path = build.library().path
    data = path.read_bytes()
    wrong = {
        "cut": data[: len(data) // 2],
        "flipped": data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        "empty": b"",
        "text": b"not a library",
    }[damage]
    path.unlink()  # a new file, so that the one this process has mapped stays whole
    path.write_bytes(wrong)
    build.library.cache_clear()
    assert build.library().path == path
    whole = path.read_bytes()
    assert whole != wrong and hashlib.sha256(whole[:-32]).digest() == whole[-32:]


@needs_library
def test_two_processes_may_compile_at_once(cache):
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: product(), range(2)))
    assert [one.stdout for one in results] == ["16.0\n"] * 2, [one.stderr for one in results]
    assert [path.suffix for path in cache.iterdir()] == [".so"]


@needs_library
def test_another_source_or_flag_is_another_library(cache, monkeypatch):
    first = build.library().path
    monkeypatch.setattr(build, "COMPILE", (*build.COMPILE, "-DANYTHING"))
    build.library.cache_clear()
    assert build.library().path != first
    monkeypatch.setattr(build, "SOURCES", build.SOURCES[:2])
    monkeypatch.setattr(build, "machine_flags", lambda: tuple(build.NEEDED.values()))
    build.library.cache_clear()
    found = build.library()
    assert len(libraries(cache)) == 3 and not found.tiles, "without AMX its header is not read"


@needs_library
@pytest.mark.parametrize("where", ["awq", "."])
def test_nothing_is_loaded_from_where_others_can_write(cache, where):
    build.library()
    folder = (cache / where if where == "." else cache).resolve()
    target = cache.parent if where == "." else folder
    target.chmod(0o777)
    build.library.cache_clear()
    found = build.library()
    if where == "awq":  # ours to put right
        assert not isinstance(found, str) and target.stat().st_mode & 0o777 == 0o700
    else:
        assert isinstance(found, str) and f"others can write to {target}" in found and "XDG_CACHE_HOME" in found
    target.chmod(0o700)


@needs_library
def test_a_library_others_can_write_is_refused(cache):
    path = build.library().path
    path.chmod(0o777)
    build.library.cache_clear()
    assert f"others can write to {path}" in str(build.library())


@needs_library
def test_a_link_is_not_followed(cache, tmp_path):
    path = build.library().path
    elsewhere = tmp_path / "elsewhere.so"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    build.library.cache_clear()
    assert build.library().path == path and not path.is_symlink()


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo odd 1.0 && exit 0\n{script}\n')
    path.chmod(0o700)
    return str(path)


@needs_library
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'x.cpp:1: error: no such flag' >&2; exit 1", "x.cpp:1: error: no such flag"),
        ("exit 3", "exit code 3"),
        ("exit 0", "cannot"),  # says it worked and makes nothing
        ('while [ $# -gt 1 ]; do shift; done; echo junk > "$1"', "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_costs_one_line(cache, tmp_path, monkeypatch, capsys, script, words):
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    found = build.library()
    assert isinstance(found, str) and words in found and "\n" not in found
    assert build.library() is found
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"the C++ kernel is not used: {found}"


def test_without_a_compiler_nothing_is_printed(cache, monkeypatch, capsys):
    monkeypatch.setattr(build, "machine_flags", lambda: ("-mfma",))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert build.library() == "no C++ compiler: install g++"
    build.library.cache_clear()
    monkeypatch.setenv("CXX", "icpx-not-here")
    assert build.library() == "no C++ compiler: icpx-not-here (CXX) is not there"
    assert capsys.readouterr().err == "" and not cache.exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fma avx512f avx512bw avx512vl avx512_bf16", tuple(build.NEEDED.values())),
        (
            "amx_tile fma avx512f amx_bf16 avx512bw avx512vl avx512_bf16 sse",
            (*build.NEEDED.values(), *build.TILES.values()),
        ),
        ("amx_tile fma avx512f avx512bw avx512vl avx512_bf16", tuple(build.NEEDED.values())),
    ],
)
def test_the_flags_are_those_of_the_machine(tmp_path, flags, expected):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: none\n")
    assert build.machine_flags(info) == expected


def test_a_machine_that_lacks_something_is_told_what(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("flags : fma avx2 avx512f avx512bw avx512vl\n")
    with pytest.raises(build.BuildError, match=r"this CPU has no avx512_bf16$"):
        build.machine_flags(info)
    with pytest.raises(build.BuildError, match="needs Linux on x86-64"):
        build.machine_flags(tmp_path / "absent")


def test_a_cache_that_cannot_be_made_is_said(cache, monkeypatch):
    (cache.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent / "file"))
    with pytest.raises(build.BuildError, match=r"no cache folder: .*Not a directory"):
        build.cache_folder()


def test_a_relative_cache_folder_is_ignored(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: cache.parent)
    assert build.cache_folder() == (cache.parent / ".cache" / "awq").resolve()
