"""Where tensors live: a device the user named, proved to be there before anything is put on it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch

from awq_core.errors import ConfigError


def dtype_name(dtype: torch.dtype) -> str:
    """As people type it: bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def pick_device(device: str | torch.device) -> torch.device:
    """The device to work on; "auto" is CUDA where there is one.

    Raises:
        ConfigError: torch does not know it, or it is not in this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is not known", hint='"auto", "cpu", "cuda" or "cuda:1"') from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: this torch sees no GPU", hint='use "cpu" or install a CUDA build')
    try:
        usable = torch.empty(1, device=chosen).cpu().numel() == 1
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise ConfigError(f"device={device!r} is not in this machine", hint='"auto", "cpu", "cuda" or "cuda:1"')
    return chosen


def pick_devices(device: str | torch.device) -> list[torch.device]:
    """One device, or several of one kind between commas: "cuda:0,cuda:1".

    Raises:
        ConfigError: as `pick_device`; an empty name; devices of two kinds, whose results would differ.
    """
    names = [name.strip() for name in str(device).split(",")]
    if len(names) > 1 and not {"", "auto"}.isdisjoint(names):
        raise ConfigError(f"device={device!r} does not name every device", hint='"cuda:0,cuda:1"')
    devices = [pick_device(name) for name in names]
    if len({one.type for one in devices}) > 1:
        raise ConfigError(f"device={device!r}: devices of two kinds", hint='"cuda:0,cuda:1"')
    return devices


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point dtype from itself or its name, "bfloat16" or "torch.bfloat16".

    Raises:
        ConfigError: torch has no such dtype, or models do not compute in it.
    """
    chosen = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ConfigError(f"dtype={dtype!r} is not possible", hint='"auto", "float32" or "bfloat16"')
    return chosen


def resident_bytes() -> int:
    """Memory of this process that is in RAM, mapped files included; where there is no /proc, the most it ever was."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024  # bytes on macOS, KiB elsewhere


def memory_bytes(device: torch.device) -> int:
    """What this process holds: `resident_bytes`, and the most that torch has allocated on a CUDA device."""
    return resident_bytes() + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)


def reset_peak(device: torch.device) -> None:
    """Forget the most that was ever in use: `peak_bytes` counts from here. For RAM, Linux alone can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`: what torch allocated on a CUDA device, else this process in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resident_bytes()


def release_freed_memory() -> None:
    """Give freed heap pages back to the operating system, where the C library can.

    Blocks of some megabytes come from the heap, and glibc keeps what is freed below the last one still in use; over
    many layers that adds up to memory nobody needs.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return  # not glibc


def compute_dtype(dtype: torch.dtype | str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What activations are computed in; "auto" is the dtype weights are stored in where the device is fast in it."""
    if dtype != "auto":
        return pick_dtype(dtype)
    if device.type == "cpu" and not (stored is torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return stored if stored in (torch.bfloat16, torch.float16, torch.float32) else torch.float32
