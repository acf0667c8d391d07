"""The victim of test_kill.py: for each line it reads, it forks a process that fills a folder and may not survive it.

A line is JSON: {"out": folder, "kill_at": step} dies by SIGKILL just before that step (0: never), {"kill_after":
seconds} at that time, {"full_at": step} finds the disk full from that step on. A step is anything that is done to a
file in the folder, or an fsync. The answer: what the process printed, and a line "status ...".
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from awq_core.checkpoint import parts
from awq_core.checkpoint.writer import CheckpointWriter
from awq_core.errors import OutputError

SHARD = 1300
FILES: dict[str, bytes | str | Path] = {"config.json": "{}", "sub/merges.txt": b"a b\n", "README.md": "model"}
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
FULL = OSError(28, "No space left on device")


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # at once: a line cut off by death would run into the next


def unit(number: int) -> dict[str, torch.Tensor]:
    """Every kind of unit: several to a shard, none, larger than a shard, one tensor larger than a shard."""
    if number == 1:
        return {}
    sizes = {2: (500, 500, 500), 3: (3000,)}.get(number, (90, 110))
    dtypes = (torch.float16, torch.int32, torch.bfloat16)
    return {
        f"layers.{number}.{i}": (torch.arange(size) + number).to(dtype)
        for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=False))
    }


def work(out: Path, units: int) -> None:
    with CheckpointWriter(out, shard_bytes=SHARD) as writer:
        writer.begin({"model": {"bits": 4}, "units": units})
        say("complete" if writer.complete else f"found {len(writer.finished)}")
        if writer.complete:
            return
        for number in range(units):
            if (key := f"layers.{number}") in writer.finished:
                assert writer.finished[key] == {"loss": number / 3}
                assert all(torch.equal(t, writer.stored(key)[name]) for name, t in unit(number).items())
                continue
            for name, tensor in unit(number).items():
                writer.add(name, tensor)
            writer.commit(key, {"loss": number / 3})
            say(f"committed {number + 1}")
        writer.add("norm", torch.ones(3))
        writer.finish(FILES)


def arm(out: Path, kill_at: int, full_at: int) -> None:
    """Count steps, and act at the one that is asked for."""
    steps = 0

    def step(writes: bool) -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if writes and full_at and steps >= full_at:
            raise FULL

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and isinstance(args[0], (str, Path)) and str(args[0]).startswith(str(out)):
            reads = event in ("os.remove", "os.rmdir") or (event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR))
            step(writes=not reads)

    save_file = parts.save_file

    def save(*args: Any, **kwargs: Any) -> None:
        try:
            step(writes=True)
        except OSError:
            raise SafetensorError("I/O error: No space left on device (os error 28)") from None
        save_file(*args, **kwargs)

    parts.save_file = save
    os.fsync = lambda descriptor: step(writes=True)  # what the system has survives our death, so none is needed
    sys.addaudithook(audit)


def victim(out: str, kill_at: int = 0, full_at: int = 0, units: int = 6, kill_after: float = 0) -> int:
    try:
        arm(Path(out), kill_at, full_at)
        work(Path(out), units)
    except OutputError as error:
        say(f"error {error}")
        return 1
    return 0


def main() -> None:
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            try:
                code = victim(**command)
            except BaseException as error:
                say(f"bug {error!r}")
                code = 2
            os._exit(code)
        if command.get("kill_after"):
            time.sleep(command["kill_after"])
            os.kill(child, signal.SIGKILL)
        say(f"status {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


if __name__ == "__main__":
    main()
