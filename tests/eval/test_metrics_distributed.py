# SPDX-License-Identifier: Apache-2.0
"""Two processes, each with a part of the questions, end with the figures of one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval.metrics_rank import CASES, figures

SCRIPT = Path(__file__).with_name("metrics_rank.py")


def test_states_add_up_over_processes(tmp_path: Path) -> None:
    world = 2
    outs = [tmp_path / f"{rank}.json" for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(world), tmp_path / "store", out],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    errors = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, errors
    alone = figures(0, 1)
    for out in outs:
        together = json.loads(out.read_text())
        assert together.keys() == CASES.keys()
        for name, values in alone.items():
            assert together[name] == pytest.approx(values), name


def test_the_parts_alone_differ_from_the_whole() -> None:
    # Otherwise the test above would pass without any synchronisation.
    whole, part = figures(0, 1), figures(0, 2)
    for name in (name for name in CASES if len(CASES[name][1]) > 1):
        assert not math.isclose(whole[name]["score"], part[name]["score"]), name
