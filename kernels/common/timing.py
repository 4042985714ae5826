# SPDX-License-Identifier: Apache-2.0
"""Side-by-side timing: the contestants take turns, so that a busy machine slows all alike."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

CLOCKS = ("wall", "cpu", "graph")
_REPEATS = 20  # calls in one graph


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with ``count`` CPU threads, then restore."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_SPIN = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
while os.getppid() == int(sys.argv[2]):
    pass
"""


@contextmanager
def loaded(busy: bool = True) -> Iterator[None]:
    """Run beside a busy loop on each core that this process may use; they end with it."""
    pinned = hasattr(os, "sched_getaffinity")
    cores = (os.sched_getaffinity(0) if pinned else range(os.cpu_count() or 1)) if busy else ()
    spin = [sys.executable, "-c", _SPIN]
    loops = [subprocess.Popen([*spin, str(core), str(os.getpid())]) for core in cores]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    warmup: int = 1,
    clock: str = "wall",
    settle: bool = False,
) -> dict[str, list[float]]:
    """Milliseconds of every round for every contestant, in turns.

    On a CUDA machine each call is waited for. ``clock="cpu"`` counts the processor time of this
    thread: with one thread it is the work done, whatever else the machine is busy with.
    ``clock="graph"`` replays CUDA graphs of the calls: the device's time, without launches.
    ``settle`` calls each once before it is timed, where one leaves the others without their memory.
    """
    if clock == "graph":
        return _replayed(contestants, rounds, warmup)
    now = time.perf_counter if clock == "wall" else time.thread_time
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, call in contestants.items():
            if settle:
                call()
            wait()
            start = now()
            call()
            wait()
            if turn >= warmup:
                times[name].append((now() - start) * 1e3)
    return times


def _replayed(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of one call in a graph of several, by the device's events."""
    graphs = {name: _captured(call) for name, call in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn >= warmup:
                times[name].append(begin.elapsed_time(end) / _REPEATS)
    return times


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, allocates and fills tables, which a graph may not
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            call()
    return graph


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Milliseconds, median and 90th percentile, and the median ratio baseline / contestant."""
    out = {}
    for name, values in times.items():
        ratios = [b / v for b, v in zip(times[baseline], values, strict=True)]
        late = sorted(values)[round(0.9 * (len(values) - 1))]
        out[name] = {
            "ms": statistics.median(values),
            "p90": late,
            "ratio": statistics.median(ratios),
        }
    return out


def table(rows: list[dict[str, object]]) -> str:
    """A Markdown table of dictionaries with equal keys."""
    if not rows:
        return ""
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
