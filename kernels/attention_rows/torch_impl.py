# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of attention rows and column sums: grouped heads, blocks of rows, fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.precision import wide

MAX_SCORES = 1 << 24  # scores held at once (fp32: 64 MiB)


def logits(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """Scores [B, H, R, N] without repeating key heads: the group shares one matrix product."""
    b, h, r, d = q.shape
    kv, n = k.shape[1], k.shape[2]
    z = q.reshape(b, kv, h // kv * r, d) @ k.transpose(2, 3)
    z = z.reshape(b, h, r, n) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def probabilities(s: Tensor, mask: Tensor | None, row_pos: Tensor | None) -> Tensor:
    """Softmax of ``s`` [B, H, R, N] under the mask; a row without any key gives zeros."""
    if mask is not None and mask.dtype == torch.bool:
        s = s.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        s = s + mask
    if row_pos is not None:
        later = torch.arange(s.shape[-1], device=s.device) > row_pos[:, :, None]
        s = s.masked_fill(later[:, None], -torch.inf)
    if mask is None and row_pos is None:
        return torch.softmax(s, -1)
    dead = s.detach().amax(-1, keepdim=True).isneginf()
    return torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def reduce_heads(p: Tensor, reduce: str) -> Tensor:
    """[B, H, ...] -> [B, ...], or unchanged for ``none``."""
    if reduce == "none":
        return p
    if reduce == "max":
        return p.amax(1)
    return p.mean(1) if reduce == "mean" else p.sum(1)


def rows_of(t: Tensor | None, start: int, stop: int, dim: int) -> Tensor | None:
    """The slice of rows, leaving a broadcast (size 1) dimension alone."""
    if t is None or t.shape[dim] == 1:
        return t
    return t.narrow(dim, start, stop - start)


def attention_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    row_pos: Tensor | None,
    reduce: str,
    softcap: float,
) -> Tensor:
    """Rows in blocks, so that a head-reduced result never holds all heads of all rows."""
    q, k = wide(q), wide(k)
    b, h, r, _ = q.shape
    n = k.shape[2]
    if 0 in (b, r, n):
        return q.new_zeros((b, h, r, n) if reduce == "none" else (b, r, n))
    block = max(1, MAX_SCORES // (b * h * n)) if reduce != "none" else r
    parts = []
    for start in range(0, r, block):
        stop = min(start + block, r)
        s = logits(q[:, :, start:stop], k, scale, softcap)
        p = probabilities(s, rows_of(mask, start, stop, 2), rows_of(row_pos, start, stop, 1))
        parts.append(reduce_heads(p, reduce))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


def column_sums(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    row_weight: Tensor | None,
    reduce: str,
    block: int,
    softcap: float,
) -> Tensor:
    """Softmax rows of ``block`` queries at a time, added up per key."""
    q, k = wide(q), wide(k)
    b, h, r, _ = q.shape
    n = k.shape[2]
    out = q.new_zeros(b, h, n)
    if 0 in (b, r, n):
        return reduce_heads(out, reduce)
    for start in range(0, r, block):
        stop = min(start + block, r)
        # Keys after the block's last row are invisible to it: half of the work is not done.
        seen = max(0, n - r + stop) if causal else n
        if seen == 0:
            continue
        p = block_probabilities(q, k, scale, mask, causal, softcap, start, stop, seen)
        out[:, :, :seen] += weighted_rows(p, rows_of(row_weight, start, stop, 1))
    return reduce_heads(out, reduce)


def block_probabilities(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    softcap: float,
    start: int,
    stop: int,
    seen: int,
) -> Tensor:
    """Softmax of rows ``start:stop`` over the first ``seen`` keys -> [B, H, rows, seen]."""
    n, r = k.shape[2], q.shape[2]
    pos = torch.arange(n - r + start, n - r + stop, device=q.device)[None] if causal else None
    part = rows_of(mask, start, stop, 2)
    part = rows_of(part, 0, seen, 3)
    return probabilities(logits(q[:, :, start:stop], k[:, :, :seen], scale, softcap), part, pos)


def weighted_rows(p: Tensor, weight: Tensor | None) -> Tensor:
    """Sum over rows [B, H, R, N] -> [B, H, N], rows weighted by ``weight`` [B, R]."""
    if weight is None:
        return p.sum(2)
    return (weight.to(p.dtype)[:, None, None, :] @ p)[:, :, 0]
