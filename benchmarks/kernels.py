"""Every int4 kernel of this machine against torch's own bf16 linear, at the shapes of an 8B model.

    python benchmarks/kernels.py --threads 1
    python benchmarks/kernels.py --layers down --rows 1 16 --json

All that is compared at one shape runs in turn, so that a machine busy with other things slows each alike; a time is
the least of the rounds. `bandwidth` is the bytes of weights read in that time over what reading or copying a large
array reaches here: at one row, 1.00 is as fast as memory allows. Weights are cycled over `--spread` bytes of copies;
where the last cache is larger than that, figures above 1 are possible.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable

import torch

from awq_core.checkpoint.pack import PackedLinear
from awq_core.hooks.defaults import KERNEL_BACKENDS
from awq_core.kernels import usable
from awq_core.kernels.survey import present_devices

LAYERS = {"o": (4096, 4096), "gate-up": (4096, 28672), "down": (14336, 4096)}  # in, out
GROUP = 128
SLOW = 1.0  # seconds: what takes longer than this once is not repeated


def packed_at_random(inputs: int, outputs: int, seed: int) -> PackedLinear:
    """Codes and zero points of every value, small scales."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.int32}
    return PackedLinear(
        torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), **draw),
        torch.randint(-(2**31), 2**31 - 1, (inputs // GROUP, outputs // 8), **draw),
        (0.01 + 0.01 * torch.rand(inputs // GROUP, outputs, generator=generator)).half(),
    )


def read_bandwidth() -> float:
    """Bytes a second of memory: the best of reading a large array and of copying it (read and written)."""
    data = torch.ones(64 << 20)
    other = torch.empty_like(data)
    reading, copying = (min(seconds(call) for _ in range(9)) for call in (data.amax, lambda: other.copy_(data)))
    return data.nbytes * max(1 / reading, 2 / copying)


def seconds(call: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def measure(inputs: int, outputs: int, rows: list[int], rounds: int, spread: int, bandwidth: float) -> list[dict]:
    """One line a kernel and number of rows; the first kernel is torch's linear."""
    copies = max(1, round(spread / (inputs * outputs / 2)))
    packed = [packed_at_random(inputs, outputs, seed) for seed in range(copies)]
    dense = [torch.randn(outputs, inputs, dtype=torch.bfloat16) for _ in range(max(1, copies // 4))]
    runs: dict[str, tuple[Callable[[torch.Tensor, int], object], int]] = {
        "linear": (lambda x, turn: torch.nn.functional.linear(x, dense[turn % len(dense)]), 2 * inputs * outputs)
    }
    for backend in KERNEL_BACKENDS:
        kernel = usable(backend, packed[0], torch.bfloat16, "cpu")
        if not isinstance(kernel, str):
            states = [kernel.prepare(one, torch.bfloat16) for one in packed]
            size = sum(tensor.nbytes for tensor in states[0].values())
            runs[backend.name] = (lambda x, turn, k=kernel, s=states: k.linear(x, s[turn % copies]), size)
    found = []
    for count in rows:
        x = torch.randn(count, inputs, dtype=torch.bfloat16)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds):
            for name, (run, _) in runs.items():
                if not times[name] or min(times[name]) < SLOW:
                    times[name].append(seconds(run, x, turn))
        for name, (_, size) in runs.items():
            best = min(times[name])
            found.append(
                {
                    "kernel": name,
                    "in": inputs,
                    "out": outputs,
                    "rows": count,
                    "ms": 1000 * best,
                    "times_linear": min(times["linear"]) / best,
                    "bandwidth": size / best / bandwidth,
                }
            )
    return found


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=15, help="times each is run; the least counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--spread", type=int, default=64 << 20, help="bytes of int4 weights cycled over at each shape")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    assert "cpu" in present_devices()
    torch.set_num_threads(options.threads)
    bandwidth = read_bandwidth()
    lines = []
    for layer in options.layers:
        for line in measure(*LAYERS[layer], options.rows, options.rounds, options.spread, bandwidth):
            lines.append({"layer": layer, **line})
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}
    if options.json:
        settings = {"threads": options.threads, "read_gb_s": bandwidth / 1e9}
        print(json.dumps({**machine, **settings, "lines": lines}, indent=2))
        return
    print(f"{machine['cpu']}, {machine['cores']} cores, {options.threads} threads, load {machine['load']:.1f}")
    print(f"torch {torch.__version__}; memory moves {bandwidth / 1e9:.1f} GB/s")
    print(f"{'layer':9}{'rows':>5}  {'kernel':10}{'ms':>9}{'x linear':>10}{'bandwidth':>11}")
    for line in lines:
        numbers = f"{line['ms']:9.2f}{line['times_linear']:10.2f}{line['bandwidth']:11.2f}"
        print(f"{line['layer']:9}{line['rows']:5}  {line['kernel']:10}{numbers}")


if __name__ == "__main__":
    main()
