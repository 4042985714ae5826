# SPDX-License-Identifier: Apache-2.0
"""``lowrank_topk`` and ``sparse_attention`` against the official Sparsifiner's stored outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, threshold

from visprune import ops

GOLDEN = Path(__file__).parents[1] / "golden" / "sparsifiner"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]


def predictor(
    q: Tensor, k: Tensor, w: dict[str, Tensor], p: dict[str, Any], active: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(coefficients [B, H, N - 1, r], basis [r, N]), the part outside the operators."""
    reduced_q = linear(q, w["proj_c_q.weight"], w["proj_c_q.bias"])
    reduced_k = linear(k, w["proj_c_k.weight"], w["proj_c_k.bias"])
    if active is not None:
        reduced_q, reduced_k = reduced_q * active, reduced_k * active
    scores = reduced_q @ (reduced_k.transpose(2, 3) @ w["proj_n"]) * p["heads"] ** -0.5
    coef = torch.softmax(scores, -1)[:, :, 1:]
    up = w.get("proj_back_n", w["proj_n"]).T
    if p["mode"] == "recon":
        return coef, up
    if p["coef_mode"] == "topk":
        top = coef.topk(p["coef_topk"], -1)
        coef = torch.zeros_like(coef).scatter(-1, top.indices, top.values)
    else:
        coef = threshold(coef, p["coef_threshold"], 0.0)
    return coef, threshold(up.abs(), p["basis_threshold"], 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_sparsifiner(case: dict[str, Any]) -> None:
    stored, p = load_file(GOLDEN / case["file"]), case["params"]
    given = {name: stored[key] for name, key in case["inputs"].items()}
    want = {name: stored[key] for name, key in case["expected"].items()}
    w = {k.removeprefix("w.").removeprefix("mask_predictor."): v for k, v in given.items()}
    q, k, v, n = given["q"], given["k"], given["v"], p["N"]
    mask = active = None
    if p["token_mask"]:  # the class token stays
        mask = torch.nn.functional.pad(given["token_mask"].bool(), (1, 0), value=True)
        active = mask[:, None, :, None].float()
    coef, basis = predictor(q, k, w, p, active)
    torch.testing.assert_close(coef, want["basis_coef"], rtol=1e-4, atol=1e-6)
    scores = coef @ basis if mask is None else (coef @ basis) * mask[:, None, None]
    torch.testing.assert_close(scores, want["approx_attn"], rtol=1e-4, atol=1e-6)
    if p["mode"] == "recon":  # trains the predictor: attention is dense there
        return
    by_score = p["score_mode"] == "threshold"
    keep, limit = (n, p["score_threshold"]) if by_score else (p["budget"], None)
    idx = ops.lowrank_topk(coef, basis, keep, threshold=limit, mask=mask)
    seen = torch.zeros(*idx.shape[:3], n + 1).scatter(-1, torch.where(idx < 0, n, idx), 1.0)
    assert case["exact_match_expected"]
    assert torch.equal(seen[..., :n].to(torch.uint8), want["mask"][:, :, 1:])
    if active is not None:
        q, k, v = q * active, k * active, v * active
    out = ops.sparse_attention(q, k, v, idx, dense_queries=1).transpose(1, 2).flatten(2)
    out = linear(out, w["proj.weight"], w["proj.bias"])
    torch.testing.assert_close(out, want["out"], rtol=1e-4, atol=1e-6)
