# SPDX-License-Identifier: Apache-2.0
"""The whole operator in plain operators of PyTorch, for gradients of gradients and for export."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import attend, padded


def _windows(t: Tensor, ws: int) -> Tensor:
    """[B, H, W, h, d] -> [B, H / ws, W / ws, h, ws * ws, d]."""
    b, height, width, heads, d = t.shape
    t = t.reshape(b, height // ws, ws, width // ws, ws, heads, d)
    return t.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def _high(
    q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None, ws: int,
    scale: float, masked: bool,
) -> Tensor:  # fmt: skip
    """Attention of every window on its own -> [B, H, W, heads, d]."""
    height, width = q.shape[1:3]
    rows, cols = -(-height // ws), -(-width // ws)
    fills = (None, pad_k, pad_v)
    if height % ws or width % ws:
        q, k, v = (
            padded(t, f, rows * ws, cols * ws) for t, f in zip((q, k, v), fills, strict=True)
        )
    qw, kw, vw = (_windows(t, ws) for t in (q, k, v))
    s = qw @ kw.transpose(-1, -2) * scale
    if masked:
        down = torch.arange(rows * ws, device=q.device) < height
        across = torch.arange(cols * ws, device=q.device) < width
        there = (down[:, None] & across).view(rows, ws, cols, ws).transpose(1, 2)
        s = s.masked_fill(~there.reshape(rows, cols, 1, 1, ws * ws), -torch.inf)
    out = (torch.softmax(s, -1) @ vw).unflatten(4, (ws, ws)).permute(0, 1, 4, 2, 5, 3, 6)
    return out.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def hilo_attention(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    low_q: Tensor | None,
    low_k: Tensor | None,
    low_v: Tensor | None,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    window_size: int,
    scale: float,
    masked: bool,
) -> Tensor:
    """As the operator: [B, H, W, Hh + Hl, d], high heads first."""
    parts = []
    if q is not None and k is not None and v is not None:
        parts.append(_high(q, k, v, pad_k, pad_v, window_size, scale, masked))
    if low_q is not None and low_k is not None and low_v is not None:
        ql, kl, vl = (t.flatten(1, 2) for t in (low_q, low_k, low_v))
        parts.append(attend(ql, kl, vl, scale).reshape(low_q.shape))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)
