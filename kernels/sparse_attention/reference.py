# SPDX-License-Identifier: Apache-2.0
"""The truth for sparse attention and for the top-k of a low-rank score: with the full matrix.

    o_i = sum over e of softmax_e(scale q_i . k[idx_ie]) v[idx_ie]      (-1 names no key)
    idx_i = the num_keep largest of (coef basis)_i that are above the threshold

A query that sees no key gives zeros (softmax would give NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, count: Tensor, scale: float) -> Tensor:
    """``count`` [B, H, N, M]: how often each key is named; the softmax sees it that often."""
    s = q @ k.transpose(2, 3) * scale + count.to(q.dtype).log()
    dead = (count == 0).all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    return p @ v


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float) -> Tensor:
    """``q`` [B, H, N, d], ``k`` [B, H, M, d], ``v`` [B, H, M, dv], ``idx`` [B, H, N, K]."""
    batch, heads, n, keys = *q.shape[:3], k.shape[2]
    count = torch.zeros(batch, heads, n, keys + 1, dtype=torch.long, device=q.device)
    at = torch.where(idx < 0, keys, idx).long()
    count = count.scatter_add(3, at, torch.ones_like(at))
    if keys == 0:
        return v.new_zeros(batch, heads, n, v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    return attend(q, k, v, count[..., :keys], scale)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int, scale: float
) -> Tensor:
    """``blocks`` bool [B or 1, H or 1, ceil(N / block_q), ceil(M / block_k)]."""
    n, keys = q.shape[2], k.shape[2]
    seen = blocks.repeat_interleave(block_q, 2)[:, :, :n].repeat_interleave(block_k, 3)
    if keys == 0:
        return v.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    count = seen[..., :keys].long().expand(*q.shape[:3], keys)
    return attend(q, k, v, count, scale)


def lowrank_topk(
    coef: Tensor, basis: Tensor, num_keep: int, threshold: float | None, mask: Tensor | None
) -> Tensor:
    """``coef`` [B, H, R, r], ``basis`` [B or 1, H or 1, r, N] -> int64 [B, H, R, num_keep].

    Indices rise along the last axis, -1 after the last one; ties keep the lower index.
    """
    scores = coef @ basis
    n = scores.shape[-1]
    barred = torch.zeros_like(scores, dtype=torch.bool)
    if threshold is not None:
        barred |= scores <= threshold
    if mask is not None:
        barred |= ~mask[:, None, None, :]
    ranked = scores.masked_fill(barred, -torch.inf).sort(dim=-1, descending=True, stable=True)
    chosen = ranked.indices[..., :num_keep]
    chosen = chosen.masked_fill(barred.gather(-1, chosen), n)  # n: sorts last, then becomes -1
    chosen = chosen.sort(-1).values
    return chosen.masked_fill(chosen == n, -1)
