# SPDX-License-Identifier: Apache-2.0
"""The bars of a study count samples, and nothing else, as samples."""

from __future__ import annotations

import io

from rich.console import Console

from visprune.eval.run.progress import Progress


def test_a_timed_run_is_no_sample() -> None:
    shown = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(shown) as bars:
        bars.plan(total=8, done=3)
        bars.advance(5)
        bars.cell("latency", 4, 0)
        bars.step()
        bars.step()
        study, cell = bars._bars.tasks
        assert (study.completed, study.total) == (8, 8)
        assert (cell.completed, cell.total) == (2, 4)
