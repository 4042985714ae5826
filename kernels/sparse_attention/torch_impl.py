# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of sparse attention by index: dense scores of a few rows, or gathered keys."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.precision import wide

# Measured on two AVX-512 threads (README): a dense score costs 1.5 ns and a gathered one 12, so
# keys are gathered where a query names less than one in eight of them.
GATHER_BELOW = 8
MAX_SCORES = 1 << 20  # dense scores held at once (fp32: 4 MiB)
MAX_GATHERED = 1 << 20  # numbers of gathered keys held at once


def flat(t: Tensor) -> Tensor:
    """[B, H, n, d] -> [B * H, n, d] in fp32, without strides (the gradient of a sum has zeros)."""
    return wide(t).flatten(0, 1).contiguous()


def pair_products(a: Tensor, b: Tensor, lists: Lists) -> Tensor:
    """``a`` [G, N, d] . ``b`` [G, M, d] at the index -> [G, N, K]."""
    if b.shape[1] > GATHER_BELOW * lists.width:
        return gathered_products(a.flatten(0, 1), b.flatten(0, 1), lists.flat).view(lists.shape)
    groups, n, keys = *a.shape[:2], b.shape[1]
    out = a.new_empty(lists.shape)
    rows = max(1, min(n, MAX_SCORES // max(1, keys)))
    many = max(1, MAX_SCORES // (rows * keys))
    for g in range(0, groups, many):
        bt = b[g : g + many].transpose(1, 2)
        for r in range(0, n, rows):
            at = (slice(g, g + many), slice(r, r + rows))
            out[at] = torch.gather(a[at] @ bt, 2, lists.safe[at])
    return out


def gathered_products(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """``a`` [S, d] . ``b`` [T, d] at ``index`` [S, K] -> [S, K]; never S x T."""
    count, width = index.shape
    out = a.new_empty(count, width)
    step = max(1, MAX_GATHERED // (width * b.shape[1]))
    buffer = b.new_empty(min(step, count) * width, b.shape[1])
    for start in range(0, count, step):
        at = index[start : start + step].flatten()
        rows = torch.index_select(b, 0, at, out=buffer[: len(at)]).view(-1, width, b.shape[1])
        # A row times a matrix: a matrix times a column takes four times as long here.
        part = out[start : start + step, None]
        torch.bmm(a[start : start + step, None], rows.transpose(1, 2), out=part)
    return out


def weighted_sum(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The sum over e of weight[i, e] rows[index[i, e]]: [S, d], [n, K], [n, K] -> [n, d]."""
    return torch.nn.functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)


class Lists:
    """The index as flat row numbers, and its transpose: for every key the queries that see it."""

    def __init__(self, idx: Tensor, keys: int) -> None:
        self.shape, self.width, self.keys = idx.shape, idx.shape[2], keys
        self.missing = idx < 0
        self.any_missing = bool(self.missing.any())
        self.safe = (idx.clamp_min(0) if self.any_missing else idx).long()
        start = torch.arange(len(idx), device=idx.device)[:, None, None] * keys
        self.flat = (self.safe + start).view(-1, self.width)

    def transpose(self) -> tuple[Tensor, Tensor]:
        """(entries in the order of their keys, where each key starts)."""
        rows = self.shape[0] * self.keys
        small = self.flat.int() if rows < 2**31 else self.flat  # sorts in half the time
        where, order = small.flatten().sort(stable=True)
        edges = torch.arange(rows, device=where.device, dtype=where.dtype)
        return order, torch.searchsorted(where, edges)

    def sum_over_queries(
        self, rows: Tensor, weight: Tensor, transposed: tuple[Tensor, Tensor]
    ) -> Tensor:
        """For every key, the weighted sum of ``rows`` [G * N, d] of its queries -> [G * M, d]."""
        order, starts = transposed
        query = order.div(self.width, rounding_mode="floor")
        return torch.nn.functional.embedding_bag(
            query, rows, starts, mode="sum", per_sample_weights=weight.flatten()[order]
        )


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, N, dv], and the probabilities [B, H, N, K] for the backward."""
    shape, dv = q.shape, v.shape[3]
    p = wide(q).new_zeros(idx.shape)
    if 0 in (*idx.shape, k.shape[2]):
        return v.new_zeros(*shape[:3], dv), p
    qf, kf, vf = (flat(t) for t in (q, k, v))
    lists = Lists(idx.flatten(0, 1), k.shape[2])
    p = probabilities(pair_products(qf, kf, lists), lists, scale)
    out = weighted_sum(vf.flatten(0, 1), lists.flat, p.view(-1, lists.width))
    return out.view(*shape[:3], dv).to(v.dtype), p.view(idx.shape)


def probabilities(s: Tensor, lists: Lists, scale: float) -> Tensor:
    """Softmax of the gathered scores; zeros where the index is -1."""
    s = s.mul_(scale)
    if not lists.any_missing:
        return torch.softmax(s, -1)
    p = torch.softmax(s.masked_fill_(lists.missing, -torch.inf), -1)
    return p.masked_fill_(lists.missing, 0.0)


def sparse_backward(
    grad: Tensor, p: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    if 0 in (*idx.shape, k.shape[2]):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    gf, qf, kf, vf, pf = (flat(t) for t in (grad, q, k, v, p))
    lists = Lists(idx.flatten(0, 1), k.shape[2])
    grad_p = pair_products(gf, vf, lists)
    grad_s = (pf * (grad_p - (pf * grad_p).sum(-1, keepdim=True))).mul_(scale)
    grad_q = weighted_sum(kf.flatten(0, 1), lists.flat, grad_s.view(-1, lists.width))
    transposed = lists.transpose()
    grad_k = lists.sum_over_queries(qf.flatten(0, 1), grad_s, transposed)
    grad_v = lists.sum_over_queries(gf.flatten(0, 1), pf, transposed)
    parts = zip((grad_q, grad_k, grad_v), (q, k, v), strict=True)
    a, b, c = (g.view(t.shape).to(t.dtype) for g, t in parts)
    return a, b, c


def lowrank_topk(
    coef: Tensor, basis: Tensor, num_keep: int, threshold: float | None, mask: Tensor | None
) -> Tensor:
    """int64 [B, H, R, num_keep]: rows in blocks, so that R x N is never held."""
    batch, heads, rows, _ = coef.shape
    n = basis.shape[3]
    out = torch.full((batch, heads, rows, num_keep), -1, dtype=torch.long, device=coef.device)
    if 0 in (*out.shape, n):
        return out
    coef, basis = wide(coef), wide(basis)
    block = max(1, MAX_SCORES // (batch * heads * n))
    for start in range(0, rows, block):
        s = coef[:, :, start : start + block] @ basis
        if threshold is not None:
            s = s.masked_fill(s <= threshold, -torch.inf)
        if mask is not None:
            s = s.masked_fill(~mask[:, None, None, :], -torch.inf)
        out[:, :, start : start + block] = best_columns(s, num_keep)
    return out


def best_columns(s: Tensor, num_keep: int) -> Tensor:
    """Rising indices of the ``num_keep`` largest of each row, -1 for -inf; ties: lower index."""
    n = s.shape[-1]
    top = torch.topk(s, num_keep, dim=-1, sorted=False)
    edge = top.values.amin(-1, keepdim=True)
    chosen = top.indices
    # `topk` picks any of the columns that tie with the last one: where it left some out, rank
    # that row by a stable sort.
    tied = (s == edge).sum(-1) > (top.values == edge).sum(-1)
    tied &= ~edge[..., 0].isneginf()
    if bool(tied.any()):
        order = s[tied].sort(dim=-1, descending=True, stable=True).indices[:, :num_keep]
        chosen[tied] = order
    # Barred columns (-inf) sort last, so they never reach a row that ties above them.
    chosen = chosen.masked_fill_(top.values.isneginf() & ~tied[..., None], n)
    chosen = chosen.sort(-1).values
    return chosen.masked_fill_(chosen == n, -1)
