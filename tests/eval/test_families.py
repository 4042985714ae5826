# SPDX-License-Identifier: Apache-2.0
"""The evaluation asks models of every kind of family, also those whose cost is not known."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval.family_processor import FamilyProcessor
from tests.families import tiny
from visprune.eval.models.vlm import VLM
from visprune.eval.run.runner import run_study
from visprune.eval.study.grid import build_study

# Stacked tiles; a list of tensors; DeepStack; rows of pictures; no known cost (two encoders).
KINDS = ("internvl", "mistral3", "qwen3_vl", "smolvlm", "video_llama_3", "deepseek_vl_hybrid")


def records(family: str, folder: Path, size: int = 3) -> list[dict[str, Any]]:
    vlm = VLM(
        tiny.build(family), FamilyProcessor(family), name=family, style="plain",
        template="w7 <image> {prompt} w8",
    )  # fmt: skip
    vlm.model.generation_config.suppress_tokens = list(range(86, 100))
    study = build_study(
        {
            "models": [family], "tasks": [{"task": "embedded", "limit": 6}], "batch_size": size,
            "methods": ["divprune", "fastv"], "budgets": [3], "controls": ["none", "no_image"],
        }
    )  # fmt: skip
    found = run_study(study, folder, loader=lambda _: vlm)
    rows = [dataclasses.asdict(record) for record in found.records()]
    names = {cell: one.label for cell, one in found.cells().items()}
    return [{**row, "method": names[row["cell"]]} for row in rows]


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_family_is_asked(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    rows = records(family, tmp_path / "a")
    assert len(rows) == 4 * 6
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    assert set(by_method) == {"none", "no_image", "divprune 3", "fastv 3"}
    count = tiny.parts._COUNTS[family, "a"]
    assert {row["tokens"] for row in by_method["none"]} == {float(count)}
    assert {row["tokens"] for row in by_method["no_image"]} == {0.0}
    assert {row["tokens"] for row in by_method["divprune 3"]} == {3.0}
    known = family != "deepseek_vl_hybrid"
    assert all((row["macs"] is not None) == known for row in rows)
    assert all((row["kv_bytes"] is not None) == known for row in rows)
    if known:
        whole, pruned = (by_method[name][0]["macs"] for name in ("none", "divprune 3"))
        assert pruned["prefill"] < whole["prefill"]
        assert pruned["vision"] == whole["vision"] > 0


def test_why_there_is_no_cost_is_said_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cost of deepseek_vl_hybrid stays empty: What") as said:
        records("deepseek_vl_hybrid", tmp_path)
    assert sum("stays empty" in str(one.message) for one in said) == 1
