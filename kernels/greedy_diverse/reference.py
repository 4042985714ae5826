# SPDX-License-Identifier: Apache-2.0
"""The truth for greedy diverse selection: the rules written out over the full N x N matrix.

Three objectives over the cosine similarity ``cos`` of the rows of ``x``:

* ``k_center`` (farthest-first, max-min): next = argmax_v min_{c kept} (1 - cos(v, c));
* ``max_sum`` (ToDRE, arXiv 2505.18757 v2, Alg. 1): next = argmin_v sum_{c kept} cos(v, c);
* ``dpp`` (greedy MAP, as in CDPruner): next = the largest residual variance of the kernel
  ``r_u cos(u, v) r_v`` given what is kept, by incremental Cholesky.

Ties keep the lower index, a kept token is never picked twice, and a row of zeros has cosine 0
with everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

OBJECTIVES = ("k_center", "max_sum", "dpp")
RULES = ("given", "mean", "farthest_neighbor", "relevance")


def unit_rows(x: Tensor) -> Tensor:
    """Rows of ``x`` at unit length; a zero row stays zero. fp64 stays fp64, the rest is fp32."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, x / norm.clamp_min(torch.finfo(x.dtype).tiny), 0.0)


def first_pick(xn: Tensor, cos: Tensor, rule: str, relevance: Tensor | None) -> int:
    """The pivot of one image. ``xn`` [N, D] unit rows, ``cos`` [N, N]."""
    if rule == "mean":
        return int((xn @ xn.sum(0)).argmin())
    if rule == "farthest_neighbor":
        others = cos.masked_fill(
            torch.eye(len(cos), dtype=torch.bool, device=cos.device), -torch.inf
        )
        return int(others.amax(1).argmin())
    here = xn.any(1).to(xn.dtype)  # a token of zeros has no variance in the kernel
    return int((here if relevance is None else here * relevance).argmax())


def greedy_one(
    x: Tensor, k: int, objective: str, pivot: int | None, rule: str, relevance: Tensor | None = None
) -> Tensor:
    """Pick ``k`` rows of ``x`` [N, D] in selection order -> int64 [k]."""
    if k <= 0:
        return torch.empty(0, dtype=torch.long, device=x.device)
    xn = unit_rows(x)
    cos = xn @ xn.T  # [N, N]
    pick = first_pick(xn, cos, rule, relevance) if pivot is None else pivot
    if objective == "dpp":
        return _dpp(cos, k, pick, relevance)
    order = [pick]
    for _ in range(k - 1):
        kept = cos[:, order]  # [N, i]
        gain = 1 - kept.amax(1) if objective == "k_center" else -kept.sum(1)
        gain[order] = -torch.inf
        order.append(int(gain.argmax()))
    return torch.tensor(order, device=cos.device)


def _dpp(cos: Tensor, k: int, pick: int, relevance: Tensor | None) -> Tensor:
    """Greedy MAP: residual variance = Schur complement of the kept block, grown row by row."""
    r = cos.new_ones(len(cos)) if relevance is None else relevance.to(cos.dtype)
    kernel = r[:, None] * cos * r[None, :]
    residual, rows, order = kernel.diagonal().clone(), kernel.new_zeros(k, len(cos)), []
    for i in range(k):
        order.append(pick)
        pivot_var = residual[pick]
        if pivot_var > 0:
            rows[i] = (kernel[pick] - rows[:i, pick] @ rows[:i]) / pivot_var.sqrt()
        residual = residual - rows[i].square()
        residual[order] = -torch.inf
        pick = int(residual.argmax())
    return torch.tensor(order, device=cos.device)


def greedy_diverse(
    x: Tensor,
    num_keep: list[int],
    objective: str = "k_center",
    pivot: list[int] | None = None,
    rule: str = "mean",
    relevance: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Batched reference: ``x`` [B, N, D] -> int64 [B, max(num_keep)], padded with -1."""
    out = torch.full((len(x), max(num_keep, default=0)), -1, device=x.device)
    for b, k in enumerate(num_keep):
        rows = (
            torch.arange(x.shape[1], device=x.device) if mask is None else mask[b].nonzero()[:, 0]
        )
        k = min(k, len(rows))
        start = None if pivot is None else int((rows == pivot[b]).nonzero()[0, 0])
        rel = None if relevance is None else relevance[b, rows]
        out[b, :k] = rows[greedy_one(x[b, rows], k, objective, start, rule, rel)]
    return out
