# SPDX-License-Identifier: Apache-2.0
"""``greedy_diverse`` against the stored outputs of the official implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from visprune import ops

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_cases(family: str) -> list[Any]:
    cases = json.loads((GOLDEN / family / "cases.json").read_text())["cases"]
    return [pytest.param(family, case, id=case["id"]) for case in cases]


def tensors(family: str, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    stored = load_file(GOLDEN / family / case["file"])
    wanted = {**case["inputs"], **case["expected"]}
    return {name: stored[key] for name, key in wanted.items() if key in stored}


def distances(x: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    return 1 - unit @ unit.T


@pytest.mark.parametrize(("family", "case"), golden_cases("todre"))
def test_todre_objectives_from_a_given_pivot(family: str, case: dict[str, Any]) -> None:
    assert case["exact_match_expected"]
    t, p = tensors(family, case), case["params"]
    for objective, key in (("k_center", "maxmin"), ("max_sum", "maxsum")):
        got = ops.greedy_diverse(t["X"], p["k"], objective=objective, pivot=p["pivot"])
        assert torch.equal(got, t[key])
    assert torch.equal(got.sort().values, t["maxsum_sorted"])


@pytest.mark.parametrize(("family", "case"), golden_cases("divprune"))
def test_divprune_order(family: str, case: dict[str, Any]) -> None:
    t, k = tensors(family, case), case["params"]["k"]
    got = ops.greedy_diverse(t["X"], k, pivot="farthest_neighbor")
    if case.get("exact_match_expected"):
        assert torch.equal(got, t["order"])
        return
    # Degenerate inputs: ties are decided by rounding. The kept tokens must be distinct, which
    # the official code does not promise, and cover the tokens at least as closely.
    assert len(set(got.tolist())) == k
    d = distances(t["X"])
    ours, official = d[:, got].amin(1).max(), d[:, t["order"]].amin(1).max()
    assert float(ours) <= float(official) + 1e-6


@pytest.mark.parametrize(("family", "case"), golden_cases("cdpruner"))
def test_cdpruner_order(family: str, case: dict[str, Any]) -> None:
    t, k = tensors(family, case), case["params"]["k"]
    got = ops.greedy_diverse(t["image_features"], k, objective="dpp", relevance=t["relevance"])
    if case.get("exact_match_expected"):
        assert torch.equal(got, t["order"])
        return
    # The kernel has rank 16 < k: the official indices are noise after that. What must hold: the
    # first 16 are those of a float64 run, and none comes twice.
    x, rel = t["image_features"].double(), t["relevance"].double()
    wide = ops.greedy_diverse(x, 16, objective="dpp", relevance=rel)
    assert torch.equal(got[:, :16], wide)
    assert len(set(got[0].tolist())) == k
