# SPDX-License-Identifier: Apache-2.0
"""Stored outputs of official implementations, as the tests of methods read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from visprune.core.tokens import VisualTokens

GOLDEN = Path(__file__).parents[1] / "golden"


def cases(family: str, **only: Any) -> Any:
    """Every case of a family, or those whose params say so."""
    found = json.loads((GOLDEN / family / "cases.json").read_text())["cases"]
    chosen = [c for c in found if all(c["params"].get(k) == v for k, v in only.items())]
    assert chosen
    return pytest.mark.parametrize("case", [pytest.param(c, id=c["id"]) for c in chosen])


def tensors(family: str, case: dict[str, Any]) -> dict[str, Any]:
    """A case's tensors by name, and the expected values that are none."""
    stored = load_file(GOLDEN / family / case["file"])
    wanted = {**case["inputs"], **case["expected"]}
    plain = case.get("expected_values", [])
    return {name: key if name in plain else stored[key] for name, key in wanted.items()}


def visual(features: Tensor, grid: tuple[int, int] | None = None) -> VisualTokens:
    """Features ``[B, N, D]`` as tokens of pictures of one row of patches, or of a grid."""
    batch, count, _ = features.shape
    steps, width = torch.arange(count), count if grid is None else grid[1]
    pos = torch.stack([torch.zeros_like(steps), steps // width, steps % width], 1)
    return VisualTokens(features, torch.ones(batch, count), pos.expand(batch, -1, -1))
