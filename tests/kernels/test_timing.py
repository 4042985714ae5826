# SPDX-License-Identifier: Apache-2.0
"""What the benches time by: turns, and a machine that is busy with something else."""

from __future__ import annotations

import os
import subprocess

import pytest

from visprune.kernels.common import timing
from visprune.kernels.neighborhood_attention import bench, cases


def test_a_loaded_machine_is_loaded_on_each_core_and_only_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def start(command: list[str]) -> subprocess.Popen[bytes]:
        started.append(real(command))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(RuntimeError, match="of the bench"):
        _fail_under_load(started)
    assert all(loop.poll() is not None for loop in started)
    with timing.loaded(busy=False):
        assert len(started) == len(os.sched_getaffinity(0))


def _fail_under_load(started: list[subprocess.Popen[bytes]]) -> None:
    with timing.loaded():
        assert len(started) == len(os.sched_getaffinity(0))
        assert all(loop.poll() is None for loop in started)
        raise RuntimeError("of the bench")


def test_the_summary_has_median_tail_and_the_ratio_of_each_turn() -> None:
    slow, fast = [float(x) for x in range(10, 21)], [float(x) for x in range(20, 9, -1)]
    found = timing.summary({"dense": slow, "ours": fast}, "dense")
    assert found["ours"] == {"ms": 15.0, "p90": 19.0, "ratio": 1.0}
    assert found["dense"]["ratio"] == 1.0


def test_the_bench_of_a_loaded_machine_tells_the_tails() -> None:
    shape = (cases.Shape("small", 9, 2, (1,), 8, 3),)
    forward, _ = bench.run(3, 1, shape, flex=False, loaded=True)
    assert forward["agree"] is True
    assert float(str(forward["p90 ms"])) >= float(str(forward["ms"]))
    assert float(str(forward["dense p90 ms"])) >= float(str(forward["dense ms"]))
    idle, _ = bench.run(1, 1, shape, flex=False)
    assert "p90 ms" not in idle
