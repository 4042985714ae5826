# SPDX-License-Identifier: Apache-2.0
"""Neighborhood attention against the stored outputs of natten 0.21.7."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from visprune import ops
from visprune.errors import ConfigError
from visprune.kernels.neighborhood_attention import reference

GOLDEN = Path(__file__).parents[1] / "golden" / "neighborhood"
STORED = json.loads((GOLDEN / "cases.json").read_text())
WINDOW = ("kernel_size", "stride", "dilation", "is_causal")


def load(case: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stored = load_file(GOLDEN / case["file"])
    given = {name: stored[key] for name, key in case["inputs"].items()}
    return given, {name: stored[key] for name, key in case["expected"].items()}


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda c: c["id"])
def test_natten(case: dict[str, Any]) -> None:
    given, want = load(case)
    p = case["params"]
    window = {key: p[key] for key in WINDOW}
    leaves = {n: given[n].requires_grad_() for n in ("q", "k", "v", "rpb") if n in given}
    q, k, v, rpb = (leaves.get(n) for n in ("q", "k", "v", "rpb"))
    assert q is not None
    assert k is not None
    assert v is not None
    fused, lse = ops.neighborhood_attention(
        q, k, v, **window, scale=p["scale"], rpb=rpb, return_lse=True
    )
    weights = ops.na_qk(q, k, **window, scale=p["scale"], rpb=rpb).softmax(-1)
    for out in (fused, ops.na_av(weights, v, **window)):
        torch.testing.assert_close(out, want["out"], rtol=1e-5, atol=2e-6)
        if "grad_q" in want:
            loss = (out * given["cotangent"]).sum()
            for name, grad in zip(
                leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True
            ):
                torch.testing.assert_close(grad, want[f"grad_{name}"], rtol=1e-4, atol=1e-5)
    if "lse" in want:
        torch.testing.assert_close(lse, want["lse"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "case", [c for c in STORED["cases"] if "neighbours" in c["expected"]], ids=lambda c: c["id"]
)
def test_neighbours_of_the_reference(case: dict[str, Any]) -> None:
    p = case["params"]
    key, _, there = reference.tables(p["shape"], *(p[name] for name in WINDOW))
    none = 1 << 20
    rising = key.masked_fill(~there, none).sort(1).values
    want = load(case)[1]["neighbours"].long()
    assert torch.equal(rising.masked_fill(rising == none, -1), want)


@pytest.mark.parametrize("case", STORED["invalid"], ids=lambda c: str(list(c.values())[:4]))
def test_what_natten_refuses_is_refused(case: dict[str, Any]) -> None:
    x = torch.zeros(1, *case["shape"], 1, 4)
    window = {key: case[key] for key in WINDOW if key in case}
    if case["raises"]:
        with pytest.raises(ConfigError):
            ops.neighborhood_attention(x, x, x, **window)
    else:
        assert ops.neighborhood_attention(x, x, x, **window).shape == x.shape
