# SPDX-License-Identifier: Apache-2.0
"""The picture of which keys a query sees, and the benchmark it stands beside."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visprune.cli import commands as cli
from visprune.errors import ConfigError
from visprune.eval.show.neighborhood_attention import Window, draw, seen_keys
from visprune.kernels.neighborhood_attention import bench, cases, reference


def test_the_drawn_keys_are_those_of_the_rule() -> None:
    window = Window((9, 11), (3, 4), (1, 2), (2, 1), (True, False))
    for query in ((0, 0), (4, 10), (8, 5)):
        want = np.zeros((9, 11), dtype=bool)
        params = ((3, 4), (1, 2), (2, 1), (True, False))
        for key in reference.seen_keys(query, (9, 11), *params):
            want[key] = True
        assert np.array_equal(seen_keys(window, query), want)


def test_the_command_writes_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seen.png"
    words = ["neighborhood_attention", "--kernel-size", "7", "--dilation", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["visprune", "bench", "--draw", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert "query 10, 10: 49 keys" in capsys.readouterr().out
    assert Image.open(out).size[0] > 500


def test_a_position_outside_is_refused(tmp_path: Path) -> None:
    window = Window((8,), (3,), (1,), (1,), (False,))
    with pytest.raises(ConfigError, match=r"each at least 0 and below the size 8; got \[8\]"):
        draw(window, [(8,)], tmp_path / "x.png")


def test_the_bench_times_nothing_that_disagrees(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (cases.Shape("small", 10, 1, (1,), 8, 3),)
    row = bench.run(1, 1, shapes, flex=False)[0]
    assert row["agree"] is True
    assert float(str(row["ms"])) > 0
    monkeypatch.setattr(bench, "_agrees", lambda *args: False)
    assert bench.run(1, 1, shapes, flex=False)[0]["ms"] == "-"
