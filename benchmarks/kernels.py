"""Every int4 kernel of this machine against torch's own linear, at the shapes of known models, peers beside them.

    python benchmarks/kernels.py --threads 1
    python benchmarks/kernels.py --models llama-2-7b qwen-2.5-7b --layers down --rows 1 16 --json
    python benchmarks/kernels.py --peers onnxruntime-w4a8 openvino-w4a8
    python benchmarks/kernels.py --device cuda --peers all

All that is compared at one shape runs in turn, so that a machine busy with other things slows each alike; a time is
the least of the rounds. `bandwidth` is the bytes of weights read in that time over what reading or copying a large
array reaches here: at one row, 1.00 is as fast as memory allows. Weights are cycled over `--spread` bytes of copies;
where the last cache is larger than that, figures above 1 are possible. `error` is the largest difference from the
product in float64, over the largest value, in 256 outputs; of a peer that has codes of its own it is from the same
weights before it rounded them. Peers run in environments that the script makes (--env-folder), each in a process of
its own that answers when it is its turn; those that are not there are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_peers import PEERS, Problem
from kernel_worker import Missing, Worker, stopwatch
from peers.environments import interpreter

from awq_core.checkpoint.pack import PackedLinear, unpack
from awq_core.hooks.defaults import KERNEL_BACKENDS
from awq_core.kernels import usable
from awq_core.kernels.survey import present_devices


def shapes(hidden: int, inner: int, key_value: int) -> dict[str, tuple[int, int]]:
    """(in, out) of a block's products, q, k, v and gate, up each as one; `key_value` outputs of k and of v."""
    return {
        "qkv": (hidden, hidden + 2 * key_value),
        "o": (hidden, hidden),
        "gate-up": (hidden, 2 * inner),
        "down": (inner, hidden),
    }


MODELS = {
    "llama-2-7b": shapes(4096, 11008, 4096),
    "llama-3-8b": shapes(4096, 14336, 1024),
    "llama-3-70b": shapes(8192, 28672, 1024),
    "qwen-2.5-7b": shapes(3584, 18944, 512),
    "qwen-2.5-32b": shapes(5120, 27648, 1024),
}
LAYERS = tuple(MODELS["llama-3-8b"])
GROUP = 128
SLOW = 1.0  # seconds: what takes longer than this once is not repeated
CHECKED = 256  # outputs compared with float64

Watch = Callable[[int], float]


def packed_at_random(inputs: int, outputs: int, seed: int, device: str = "cpu") -> PackedLinear:
    """Codes and zero points of every value, small scales."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.int32}
    return PackedLinear(
        torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), **draw).to(device),
        torch.randint(-(2**31), 2**31 - 1, (inputs // GROUP, outputs // 8), **draw).to(device),
        (0.01 + 0.01 * torch.rand(inputs // GROUP, outputs, generator=generator)).half().to(device),
    )


def problem_of(packed: PackedLinear) -> Problem:
    """The same numbers as plain arrays, one row an output."""
    codes, zeros, scales = unpack(packed.qweight), unpack(packed.qzeros), packed.scales.float()
    return Problem(*(one.T.cpu().contiguous().numpy() for one in (codes, zeros, scales)))


def read_bandwidth(device: str) -> float:
    """Bytes a second of memory: the best of reading and of copying (read and written) parts of a large array.

    Parts of 16 MiB take a millisecond or so, as a product does: a busy machine interrupts both alike.
    """
    data = torch.ones((64 if device == "cpu" else 1024) << 20, device=device)
    parts, others = data.split(4 << 20), torch.empty_like(data).split(4 << 20)
    reads = [part.amax for part in parts]
    copies = [partial(other.copy_, part) for other, part in zip(others, parts, strict=True)]
    reading, copying = (min(map(stopwatch(calls, device), range(3 * len(parts)))) for calls in (reads, copies))
    return parts[0].nbytes * max(1 / reading, 2 / copying)


class Ours:
    """A product of this process: torch's linear, or one of our kernels."""

    def __init__(self, products: list[Callable[[torch.Tensor], torch.Tensor]], size: int, device: str) -> None:
        self.products, self.size, self.device = products, size, device

    def check(self, x: torch.Tensor) -> np.ndarray:
        return self.products[0](x).float().cpu().numpy()

    def watch(self, x: torch.Tensor) -> Watch:
        return stopwatch([partial(product, x) for product in self.products], self.device)


class Theirs:
    """A peer in its process. It is given fp32 where it wants that: what a program around it would do."""

    def __init__(self, worker: Worker, problem: Path, copies: int, size: int) -> None:
        self.worker, self.folder, self.size = worker, problem.parent, size
        worker.ask(problem=str(problem), copies=copies)

    def check(self, x: torch.Tensor) -> np.ndarray:
        given, made = self.folder / "x.npy", self.folder / "y.npy"
        np.save(given, x.float().cpu().numpy())
        self.worker.ask(check=str(given), out=str(made))
        return np.load(made)

    def watch(self, x: torch.Tensor) -> Watch:
        self.worker.ask(rows=len(x))
        return lambda turn: self.worker.ask(turn=turn)


def ours(
    packed: list[PackedLinear], dtype: torch.dtype, device: str, chosen: Sequence[str], absent: dict[str, str]
) -> Iterator[tuple[str, Ours]]:
    """torch's linear and every backend of `chosen` that runs here; why the others do not goes into `absent`."""
    inputs, outputs = packed[0].qweight.shape[0], packed[0].scales.shape[1]
    copies = range(max(1, len(packed) // 4))
    dense = [torch.randn(outputs, inputs, dtype=dtype, device=device) for _ in copies]
    linears = [partial(torch.nn.functional.linear, weight=weight) for weight in dense]
    yield "linear", Ours(linears, 2 * inputs * outputs, device)
    for backend in (one for one in KERNEL_BACKENDS if one.name in chosen):
        kernel = usable(backend, packed[0], dtype, device)
        if isinstance(kernel, str):
            absent[backend.name] = kernel
            continue
        states = [kernel.prepare(one, dtype) for one in packed]
        size = sum(tensor.nbytes for tensor in states[0].values())
        yield backend.name, Ours([partial(kernel.linear, state=state) for state in states], size, device)


def measure(
    inputs: int,
    outputs: int,
    rows: list[int],
    *,
    rounds: int,
    spread: int,
    dtype: torch.dtype,
    device: str,
    chosen: Sequence[str],
    workers: dict[str, Worker],
    absent: dict[str, str],
) -> list[dict[str, Any]]:
    """One line a kernel and number of rows; the first kernel is torch's linear."""
    copies = max(1, round(spread / (inputs * outputs / 2)))
    packed = [packed_at_random(inputs, outputs, seed, device) for seed in range(copies)]
    problem = problem_of(packed[0])
    runs: dict[str, Ours | Theirs] = dict(ours(packed, dtype, device, chosen, absent))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "problem.npz"
        if workers:
            np.savez(file, codes=problem.codes, zeros=problem.zeros, scales=problem.scales)
        for name, worker in workers.items():
            try:
                size = problem.codes.size // 2 + problem.zeros.size // 2 + 2 * problem.scales.size
                runs[name] = Theirs(worker, file, copies, size)
            except Missing as reason:
                absent[name] = str(reason)
        errors = {}
        for name in list(runs):
            if name != "linear":  # its weights are others
                try:
                    errors[name] = error_of(runs[name], problem, dtype, device)
                except Missing as reason:
                    absent[name] = str(reason)
                    del runs[name]
        for count in rows:
            x = torch.randn(count, inputs, dtype=dtype, device=device)
            best = fastest({name: run.watch(x) for name, run in runs.items()}, rounds)
            for name, seconds in best.items():
                line = {"kernel": name, "in": inputs, "out": outputs, "rows": count, "ms": 1000 * seconds}
                line |= {"times_linear": best["linear"] / seconds, "error": errors.get(name)}
                found.append({**line, "bytes": runs[name].size})
    return found


def fastest(watches: dict[str, Watch], rounds: int) -> dict[str, float]:
    """The least time of each, all in turn; what is slow runs once."""
    best: dict[str, float] = {}
    for turn in range(rounds):
        for name, watch in watches.items():
            if best.get(name, 0.0) < SLOW:
                best[name] = min(best.get(name, float("inf")), watch(turn))
    return best


def error_of(run: Ours | Theirs, problem: Problem, dtype: torch.dtype, device: str) -> float:
    """Largest difference from float64 over the largest value."""
    x = torch.randn(3, problem.codes.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    part = Problem(problem.codes[:CHECKED], problem.zeros[:CHECKED], problem.scales[:CHECKED])
    expected = x.double().numpy() @ part.weight.astype(np.float64).T
    return float(np.abs(run.check(x.to(device))[:, :CHECKED] - expected).max() / np.abs(expected).max())


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def started(names: list[str], folder: Path, threads: int) -> Iterator[dict[str, Worker]]:
    """The peers' processes, in environments that are made where they are missing."""
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            python = interpreter(PEERS[name].environment, folder, partial(print, file=sys.stderr))
            workers[name] = Worker(python, name, threads)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-3-8b"])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 256, 512])
    parser.add_argument("--rounds", type=int, default=15, help="times each is run; the least counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--spread", type=int, default=64 << 20, help="bytes of int4 weights cycled over at each shape")
    names = [backend.name for backend in KERNEL_BACKENDS]
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, help="of this project")
    peers = ["all", *PEERS]
    parser.add_argument("--peers", nargs="+", choices=peers, default=[], metavar="PEER", help=", ".join(peers))
    default = Path(__file__).resolve().parents[1] / ".cache" / "peers"
    parser.add_argument("--env-folder", type=Path, default=default, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    device, dtype = options.device, getattr(torch, options.dtype)
    if device not in present_devices():
        parser.error(f"--device {device}: torch sees none here")
    torch.set_num_threads(options.threads)
    wanted = PEERS if "all" in options.peers else options.peers
    absent = {name: f"runs on {PEERS[name].device}" for name in wanted if PEERS[name].device != device}
    lines, bandwidth = [], 0.0
    with started([name for name in wanted if name not in absent], options.env_folder, options.threads) as workers:
        settings = {"rounds": options.rounds, "spread": options.spread, "dtype": dtype, "device": device}
        settings |= {"chosen": options.kernels, "workers": workers, "absent": absent}
        for model in options.models:
            for layer in options.layers:
                bandwidth = max(bandwidth, read_bandwidth(device))  # the machine may have been busy the last time
                for line in measure(*MODELS[model][layer], options.rows, **settings):
                    lines.append({"model": model, "layer": layer, **line})
    for line in lines:
        line["bandwidth"] = line.pop("bytes") / (line["ms"] / 1000) / bandwidth
    machine = {"device": device_name(device), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    machine |= {"torch": torch.__version__, "threads": options.threads, "dtype": options.dtype}
    machine |= {"memory_gb_s": bandwidth / 1e9}
    if options.json:
        print(json.dumps({**machine, "absent": absent, "lines": lines}, indent=2))
        return
    print(f"{machine['device']}, {machine['cores']} cores, {options.threads} threads, load {machine['load']:.1f}")
    print(f"torch {torch.__version__}, {options.dtype}; memory moves {bandwidth / 1e9:.1f} GB/s")
    print(f"{'model':14}{'layer':9}{'rows':>5}  {'kernel':18}{'ms':>9}{'x linear':>10}{'bandwidth':>11}{'error':>10}")
    for line in lines:
        numbers = f"{line['ms']:9.3f}{line['times_linear']:10.2f}{line['bandwidth']:11.2f}"
        error = f"{line['error']:10.1e}" if line["error"] is not None else ""
        print(f"{line['model']:14}{line['layer']:9}{line['rows']:5}  {line['kernel']:18}{numbers}{error}")
    for name, reason in absent.items():
        print(f"not run: {name}: {reason}")


if __name__ == "__main__":
    main()
