# SPDX-License-Identifier: Apache-2.0
"""The truth for HiLo attention (arXiv 2205.13213): window by window, then all pooled keys.

    high:  o_i = sum over j in the window of i of softmax_j(scale q_i . k_j) v_j
    low:   o_i = sum over pooled keys m        of softmax_m(scale q_i . k_m) v_m

The grid is padded right and bottom to a multiple of the window. A padded token is a key like
any other, with key ``pad_k`` and value ``pad_v`` (what a projection with bias makes of a zero),
unless ``masked``: then nobody sees it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded(t: Tensor, fill: Tensor | None, rows: int, cols: int) -> Tensor:
    """``t`` [B, H, W, heads, d] with ``fill`` [heads, d] (None: zeros) right and below."""
    fill = t.new_zeros(t.shape[3:]) if fill is None else fill
    b, h, w = t.shape[:3]
    right = fill.expand(b, h, cols - w, *fill.shape)
    below = fill.expand(b, rows - h, cols, *fill.shape)
    return torch.cat([torch.cat([t, right], 2), below], 1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``q`` [B, n, heads, d], ``k`` and ``v`` [B, m, heads, d] -> [B, n, heads, d]."""
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    return torch.einsum("bhnm,bmhd->bnhd", torch.softmax(s, -1), v)


def high_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pad_k: Tensor | None,
    pad_v: Tensor | None,
    ws: int,
    scale: float,
    masked: bool,
) -> Tensor:
    """Attention of every window on its own -> [B, H, W, heads, d]."""
    height, width = q.shape[1:3]
    rows, cols = -(-height // ws) * ws, -(-width // ws) * ws
    if not masked:
        k, v = padded(k, pad_k, rows, cols), padded(v, pad_v, rows, cols)
    lines = []
    for y in range(0, height, ws):
        line = []
        for x in range(0, width, ws):
            tile = [t[:, y : y + ws, x : x + ws] for t in (q, k, v)]
            qt, kt, vt = (t.flatten(1, 2) for t in tile)
            line.append(attend(qt, kt, vt, scale).reshape(tile[0].shape))
        lines.append(torch.cat(line, 2))
    return torch.cat(lines, 1)


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
    """``q`` [B, H, W, Hh, d], ``low_q`` [B, H, W, Hl, d], ``low_k`` [B, h, w, Hl, d]."""
    parts = []
    if q is not None and k is not None and v is not None:
        empty = 0 in q.shape
        args = (pad_k, pad_v, window_size, scale, masked)
        parts.append((q + k + v) * 0 if empty else high_branch(q, k, v, *args))
    if low_q is not None and low_k is not None and low_v is not None:
        ql, kl, vl = (t.flatten(1, 2) for t in (low_q, low_k, low_v))
        parts.append(attend(ql, kl, vl, scale).reshape(low_q.shape))
    return torch.cat(parts, 3)


def pool(x: Tensor, window_size: int, masked: bool) -> Tensor:
    """Mean of every window of ``x`` [B, H, W, C] -> [B, ceil(H / ws), ceil(W / ws), C].

    Padded tokens are zeros that count in the mean, or, ``masked``, do not count.
    """
    ws = window_size
    rows, cols = -(-x.shape[1] // ws), -(-x.shape[2] // ws)
    out = x.new_zeros(x.shape[0], rows, cols, x.shape[3])
    for i in range(rows):
        for j in range(cols):
            tile = x[:, i * ws : (i + 1) * ws, j * ws : (j + 1) * ws]
            count = tile.shape[1] * tile.shape[2] if masked else ws * ws
            out[:, i, j] = tile.sum((1, 2)) / count
    return out
