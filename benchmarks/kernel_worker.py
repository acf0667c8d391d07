"""Another project's product in a process of its own, timed when asked.

    python kernel_worker.py PEER --threads N        in the peer's environment; requests and answers are JSON lines

`Worker` is the other end of it. So a peer has whatever versions it needs, and its calls still take turns with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kernel_peers import PEERS, Bind, Peer, Problem


class Missing(Exception):
    """The peer is not installed, or cannot do what was asked."""


class Worker:
    """A started peer; `ask` sends a request and waits for its answer."""

    def __init__(self, python: Path, name: str, threads: int) -> None:
        command = [str(python), str(Path(__file__)), name, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def ask(self, **request: Any) -> float:
        """Seconds, of a request that takes time; else 0.

        Raises:
            Missing: why the peer has no answer.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or '{"missing": "it stopped"}')
        except BrokenPipeError:
            answer = {"missing": "it stopped"}
        if "missing" in answer:
            raise Missing(answer["missing"])
        return float(answer.get("seconds", 0.0))

    def close(self) -> None:
        """End the process."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def stopwatch(calls: Sequence[Callable[[], Any]], device: str) -> Callable[[int], float]:
    """A function of the turn that says how many seconds one of `calls` took.

    On a CPU one call a turn; on CUDA all of them as one captured graph, so that launching costs nothing, divided by
    their number.
    """
    if device == "cpu":

        def one(turn: int) -> float:
            begin = time.perf_counter()
            calls[turn % len(calls)]()
            return time.perf_counter() - begin

        return one
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is tuned or compiled at first use must be so before it is captured
        for call in calls:
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def all_of_them(turn: int) -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / len(calls)

    return all_of_them


def serve(peer: Peer, threads: int) -> None:
    """Answer requests until stdin ends: {"problem", "copies"}, {"check", "out"}, {"rows"}, {"turn"}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    bound: list[Bind] = []
    watch: Callable[[int], float] = lambda turn: 0.0  # noqa: E731
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        try:
            if "problem" in request:
                with np.load(request["problem"]) as arrays:
                    problem = Problem(arrays["codes"], arrays["zeros"], arrays["scales"])
                bound = [peer.function(problem, threads) for _ in range(request["copies"])]
            elif "check" in request:
                run, read = bound[0](np.load(request["check"]))
                np.save(request["out"], read(run()))
            elif "rows" in request:
                x = np.random.default_rng(0).standard_normal((request["rows"], problem.codes.shape[1]), np.float32)
                watch = stopwatch([bind(x)[0] for bind in bound], peer.device)
            else:
                answer = {"seconds": watch(request["turn"])}
        except ImportError as error:
            answer = {"missing": f"not installed: {error}"}
        except Exception as error:
            answer = {"missing": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    serve(PEERS[options.peer], options.threads)
