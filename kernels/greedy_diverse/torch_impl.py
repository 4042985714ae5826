# SPDX-License-Identifier: Apache-2.0
"""PyTorch paths of greedy diverse selection (rules: ``reference.py``).

On the CPU every image goes its own way: over the block triangle of its Gram matrix, or, where
that was measured to be slower or would not fit, over only the cosines that decide
(``pruned.py``). Elsewhere all images go together over one batched Gram matrix without waiting
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import pruned

LEAF = 256  # diagonal blocks of the Gram matrix up to this size are computed whole
MAX_GRAM = 8192  # tokens; above, N x N floats (256 MiB) are not worth their memory


def select(
    x: Tensor,
    keep: Tensor | None,
    width: int,
    objective: str,
    rule: str,
    pivot: Tensor | None,
    relevance: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """``x`` [B, N, D] -> int64 [B, width]; -1 where a row keeps fewer."""
    if 0 in (x.shape[0], x.shape[1], width):
        return torch.full((len(x), width), -1, dtype=torch.long, device=x.device)
    if x.device.type != "cpu":
        out = gram_path(x, width, objective, rule, pivot, relevance, mask)
        return pad_short_rows(out, keep, mask)
    out = torch.full((len(x), width), -1, dtype=torch.long)
    for b in range(len(x)):
        k = width if keep is None else int(keep[b])
        row, start = x[b], None if pivot is None else int(pivot[b])
        rel = None if relevance is None else relevance[b]
        which = None
        if mask is not None and not bool(mask[b].all()):
            which = mask[b].nonzero()[:, 0]
            row, rel = row[which], None if rel is None else rel[which]
            start = start if start is None else int(torch.searchsorted(which, start))
        k = min(k, len(row))
        if k:
            got = select_one(row, k, objective, rule, start, rel)
            out[b, :k] = got if which is None else which[got]
    return out


def select_one(
    x: Tensor, k: int, objective: str, rule: str, pivot: int | None, rel: Tensor | None
) -> Tensor:
    """One image on the CPU: ``x`` [N, D], all rows candidates -> int64 [k]."""
    x = x if x.dtype == torch.float64 else x.float()
    inv = pruned.inverse_norms(x)
    rel = torch.ones_like(inv) if rel is None else rel.to(x.dtype)
    if pivot is None and rule == "relevance":
        pivot = int(torch.where(inv > 0, rel, 0.0).argmax())
    if pivot is None and rule == "mean":
        pivot = pruned.mean_pivot(x, inv)
    if not prefer_pruned(len(x), x.shape[1], k, objective, pivot is None):
        return _gram_one(gram_triangle(x * inv[:, None]), k, objective, pivot, rel)
    pivot = pruned.isolated_token(x, inv) if pivot is None else pivot
    if objective == "k_center":
        return pruned.k_center(x, inv, k, pivot)
    if objective == "max_sum":
        return pruned.max_sum(x, inv, k, pivot)
    return pruned.dpp(x, inv, k, pivot, rel)


def prefer_pruned(n: int, dim: int, k: int, objective: str, search_pivot: bool) -> bool:
    """Whether the O(N D) path beats the Gram matrix, from the table in README.md.

    The path pays a fixed price per pick, the Gram matrix N^2 D products. ``max_sum`` moves all
    scores at every pick, so leaders change too often for columns computed ahead.
    """
    if n > MAX_GRAM:
        return True
    if objective == "max_sum" or k > n // 4:
        return False
    work = n * n * dim
    return work > (8e9 if search_pivot else 2.5e9 if objective == "k_center" else 1e9)


def gram_triangle(xn: Tensor) -> Tensor:
    """Gram matrix of unit rows [N, D]: every product above the diagonal blocks once."""
    gram = xn.new_empty(len(xn), len(xn))
    _fill(xn, gram)
    return gram


def _fill(xn: Tensor, gram: Tensor) -> None:
    """Off-diagonal half by one product, mirrored; the two diagonal quarters recursively."""
    n = len(xn)
    if n <= LEAF:
        torch.mm(xn, xn.T, out=gram)
        return
    h = n // 2
    torch.mm(xn[:h], xn[h:].T, out=gram[:h, h:])
    gram[h:, :h] = gram[:h, h:].T
    _fill(xn[:h], gram[:h, :h])
    _fill(xn[h:], gram[h:, h:])


def _gram_one(gram: Tensor, k: int, objective: str, pivot: int | None, rel: Tensor) -> Tensor:
    """The greedy loop of one image over its Gram matrix [N, N] -> int64 [k]."""
    if pivot is None:
        diagonal = gram.diagonal().clone()
        near = gram.fill_diagonal_(-torch.inf).amax(1)
        gram.diagonal().copy_(diagonal)
        pivot = int(near.argmin())
    if objective == "dpp":
        picks = torch.tensor([pivot])
        ones = torch.zeros_like(gram[:1], dtype=torch.bool)
        return _dpp_loop(gram[None], picks, k, rel[None], ones)[0]
    score = torch.full_like(gram[0], -torch.inf if objective == "k_center" else 0.0)
    fold = torch.maximum if objective == "k_center" else torch.add
    order = [pivot]
    for _ in range(k - 1):
        fold(score, gram[pivot], out=score)
        score[pivot] = torch.inf
        pivot = int(score.argmin())
        order.append(pivot)
    return torch.tensor(order)


def unit_rows(x: Tensor) -> Tensor:
    """Rows at unit length in fp32 (fp64 stays); zero rows stay zero."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(norm > 0, 1 / norm, 0.0)


def gram_path(
    x: Tensor,
    width: int,
    objective: str,
    rule: str,
    pivot: Tensor | None,
    relevance: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """All images at once over one [B, N, N] Gram matrix; no host synchronisation."""
    xn = unit_rows(x)
    gram = xn @ xn.transpose(1, 2)
    gone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else ~mask
    rel = torch.ones_like(gram[..., 0]) if relevance is None else relevance.to(gram.dtype)
    pick = first_pick(xn, gram, rule, pivot, rel, gone)
    if objective == "dpp":
        return _dpp_loop(gram, pick, width, rel, gone)
    return _distance_loop(gram, pick, width, objective, gone)


def first_pick(
    xn: Tensor, gram: Tensor, rule: str, pivot: Tensor | None, rel: Tensor, gone: Tensor
) -> Tensor:
    """The first token of every image -> int64 [B]."""
    if pivot is not None:
        return pivot
    if rule == "mean":
        total = xn.masked_fill(gone[..., None], 0).sum(1)  # [B, D]
        return (xn @ total[..., None])[..., 0].masked_fill(gone, torch.inf).argmin(1)
    if rule == "farthest_neighbor":
        eye = torch.eye(gram.shape[1], dtype=torch.bool, device=gram.device)
        near = gram.masked_fill(eye | gone[:, None, :], -torch.inf).amax(2)
        return near.masked_fill(gone, torch.inf).argmin(1)
    return (rel * xn.any(2)).masked_fill(gone, -torch.inf).argmax(1)


def _distance_loop(gram: Tensor, pick: Tensor, width: int, objective: str, gone: Tensor) -> Tensor:
    """k_center and max_sum: keep the token with the smallest max (sum) of cosines."""
    rows = torch.arange(len(gram), device=gram.device)
    out = torch.empty(len(gram), width, dtype=torch.long, device=gram.device)
    score = torch.full_like(gram[..., 0], -torch.inf if objective == "k_center" else 0.0)
    fold = torch.maximum if objective == "k_center" else torch.add
    score.masked_fill_(gone, torch.inf)
    for i in range(width):
        out[:, i] = pick
        fold(score, gram[rows, pick], out=score)
        score[rows, pick] = torch.inf
        pick = score.argmin(1)
    return out


def start_residual(gram: Tensor, rel: Tensor, gone: Tensor) -> Tensor:
    """Diagonal of the kernel [B, N], exactly r^2 (a computed one would break ties by rounding)."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    return (rel.square() * (diagonal > 0)).masked_fill(gone, -torch.inf)


def _dpp_loop(gram: Tensor, pick: Tensor, width: int, rel: Tensor, gone: Tensor) -> Tensor:
    """Greedy MAP by incremental Cholesky: ``chol`` [B, i, N] holds the rows so far."""
    rows = torch.arange(len(gram), device=gram.device)
    out = torch.empty(len(gram), width, dtype=torch.long, device=gram.device)
    chol = gram.new_zeros(len(gram), width, gram.shape[1])
    residual = start_residual(gram, rel, gone)
    for i in range(width):
        out[:, i] = pick
        var = residual[rows, pick]  # [B]
        row = gram[rows, pick] * rel * rel[rows, pick, None]
        row -= (chol[rows, :i, pick][:, None] @ chol[:, :i])[:, 0]
        row *= torch.where(var > 0, var.rsqrt(), 0.0)[:, None]
        chol[:, i] = row
        residual = residual - row.square()
        residual[rows, pick] = -torch.inf
        pick = residual.argmax(1)
    return out


def pad_short_rows(out: Tensor, keep: Tensor | None, mask: Tensor | None) -> Tensor:
    """Write -1 after the last token that a row may keep."""
    limit = out.new_full((len(out),), out.shape[1])
    if keep is not None:
        limit = torch.minimum(limit, keep.to(limit))
    if mask is not None:
        limit = torch.minimum(limit, mask.sum(1))
    step = torch.arange(out.shape[1], device=out.device)
    return out.masked_fill(step >= limit[:, None], -1)
