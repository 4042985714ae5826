# SPDX-License-Identifier: Apache-2.0
"""Sparsifiner's predictor and attention against the official outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from visprune.backbones.vit.sparsifiner_attention import SparsifinerAttention, Sparsity, _as_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "sparsifiner"
CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]


def attention(p: dict[str, Any]) -> SparsifinerAttention:
    rule = Sparsity(
        keep_rate=p["keep_rate"],
        score_threshold=p["score_threshold"] if p["score_mode"] == "threshold" else None,
        coef_topk=p["coef_topk"] if p["coef_mode"] == "topk" else None,
        coef_threshold=p["coef_threshold"],
        basis_threshold=p["basis_threshold"],
    )
    predictor = {
        "num_tokens": p["N"],
        "num_prefix": 1,
        "rank": p["rank"],
        "reduce_c_factor": p["head_dim"] // p["reduced_c"],
        "share_inout_proj": p["share_inout_proj"],
        "sparsity": rule,
    }
    return SparsifinerAttention(p["C"], p["heads"], predictor)


def loaded(case: dict[str, Any]) -> tuple[SparsifinerAttention, dict[str, Tensor], dict[str, Any]]:
    stored = load_file(GOLDEN / case["file"])
    attn = attention(case["params"])
    weights = {n[2:]: stored[key] for n, key in case["inputs"].items() if n.startswith("w.")}
    attn.load_state_dict(weights)  # strict: the published names, and no other
    given = {n: stored[key] for n, key in case["inputs"].items()}
    return attn.eval(), given, {n: stored[key] for n, key in case["expected"].items()}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_official_outputs(case: dict[str, Any]) -> None:
    attn, given, want = loaded(case)
    predictor, x = attn.mask_predictor, given["x"]
    with torch.no_grad():
        if case["params"]["mode"] == "recon":
            got = attn.full(x, reconstruct=True)
            coef = predictor.coefficients(given["q"], given["k"], None)
            torch.testing.assert_close(coef, want["basis_coef"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got.predicted, want["approx_attn"], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got.x, want["out"], rtol=1e-4, atol=1e-6)
            return
        coef, basis = predictor(given["q"], given["k"])
        idx = predictor.select(coef, basis)
        torch.testing.assert_close(coef, want["basis_coef"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(coef @ basis, want["approx_attn"], rtol=1e-4, atol=1e-6)
        assert torch.equal(_as_mask(idx, x.shape[1], 1), want["mask"].bool())
        sparse = attn(x)
        torch.testing.assert_close(sparse, want["out"], rtol=1e-4, atol=1e-6)
        # In training the same values, densely: masked, and with the learned mask.
        torch.testing.assert_close(attn.train()(x), sparse, rtol=1e-4, atol=1e-6)
        object.__setattr__(predictor.sparsity, "mask_gradient", "straight_through")
        torch.testing.assert_close(attn(x), sparse, rtol=1e-4, atol=1e-6)


def masked_rows(attn: SparsifinerAttention, x: Tensor, active: Tensor) -> Tensor:
    """The official rule for dropped tokens, which stay as zeros: patch rows [B, N - 1, C]."""
    predictor, rule = attn.mask_predictor, attn.mask_predictor.sparsity
    alive = torch.cat((torch.ones(len(x), 1, dtype=torch.bool), active), 1)[:, None, :, None]
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4) * alive
    low_q, low_k = predictor.proj_c_q(q) * alive, predictor.proj_c_k(k) * alive
    coef = (low_q @ (low_k.transpose(2, 3) @ predictor.proj_n) * attn.num_heads**-0.5).softmax(-1)
    top = coef[:, :, 1:].topk(rule.coef_topk)
    coef = torch.zeros_like(coef[:, :, 1:]).scatter(-1, top.indices, top.values)
    up = predictor.proj_back_n.abs()
    scores = coef @ (up * (up > rule.basis_threshold)).t()
    scores = scores.masked_fill(~alive.transpose(2, 3), -torch.inf)
    budget = min(int(active[0].sum()), math.ceil(rule.keep_rate * x.shape[1]))
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(budget).indices, 1.0).bool()
    weight = (q[:, :, 1:] @ k.transpose(2, 3) * attn.scale).masked_fill(~mask, -torch.inf)
    return attn.proj((weight.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("left", [30, 9])  # above and below the budget of 13 keys
def test_removed_tokens_equal_masked_ones(left: int) -> None:
    # Without the zeros the rows of the other patches are the same. The class token's row is not:
    # in the official code its softmax goes on counting every zero.
    attn, given, _ = loaded(CASES[0])
    x = torch.cat((given["x"], given["x"].flip(1)))
    chosen = torch.stack([torch.randperm(49, generator=torch.Generator().manual_seed(i))[:left]
                          for i in range(2)]).sort(-1).values  # fmt: skip
    active = torch.zeros(2, 49, dtype=torch.bool).scatter(1, chosen, True)
    kept = torch.cat((torch.zeros(2, 1, dtype=torch.long), chosen + 1), 1)
    with torch.no_grad():
        want = masked_rows(attn, x, active)[active].view(2, left, -1)
        out = attn.full(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), kept).x
        torch.testing.assert_close(out[:, 1:], want, rtol=1e-4, atol=1e-6)
