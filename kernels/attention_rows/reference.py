# SPDX-License-Identifier: Apache-2.0
"""The truth for attention rows: repeat the key heads, write the scores out, softmax, reduce.

    z = scale * q k^T;  s = z, or softcap * tanh(z / softcap);  P = softmax(s + mask)

A row that may see no key at all is a row of zeros (softmax would give NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(mask: Tensor | None, row_pos: Tensor | None, s: Tensor) -> Tensor:
    """Additive mask like ``s`` [B, H, R, N] from a given one and the causal positions."""
    out = torch.zeros_like(s, dtype=torch.float64)
    if mask is not None and mask.dtype == torch.bool:
        out = out.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        out = out + mask
    if row_pos is not None:  # [B, R]: key j is visible when j <= position of the row
        later = torch.arange(s.shape[-1], device=s.device) > row_pos[:, :, None]
        out = out.masked_fill(later[:, None], -torch.inf)
    return out


def attention_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None = None,
    row_pos: Tensor | None = None,
    reduce: str = "none",
    softcap: float = 0.0,
) -> Tensor:
    """``q`` [B, H, R, d], ``k`` [B, Hkv, N, d] -> [B, H, R, N], or [B, R, N] if reduced."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = q @ k.transpose(2, 3) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s + visible(mask, row_pos, s).to(s.dtype)
    dead = s.isneginf().all(-1, keepdim=True)
    p = torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if reduce == "none":
        return p
    if reduce == "max":
        return p.amax(1)
    return p.mean(1) if reduce == "mean" else p.sum(1)


def column_sums(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    row_weight: Tensor | None = None,
    reduce: str = "mean",
    softcap: float = 0.0,
) -> Tensor:
    """Attention that each key receives, summed over rows -> [B, N], or [B, H, N] unreduced."""
    rows, n = q.shape[2], k.shape[2]
    row_pos = torch.arange(n - rows, n, device=q.device).expand(len(q), rows) if causal else None
    p = attention_rows(q, k, scale, mask, row_pos, "none", softcap)
    if row_weight is not None:
        p = p * row_weight.to(p.dtype)[:, None, :, None]
    p = p.sum(2)  # [B, H, N]
    return p if reduce == "none" else {"mean": p.mean, "sum": p.sum}[reduce](1)
