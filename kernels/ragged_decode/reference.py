# SPDX-License-Identifier: Apache-2.0
"""The truth for decoding over ragged keys and values: one loop per head and query.

    z_j = scale * q . k_j;  s_j = cap(z_j) + bias_j;  out = sum_j softmax(s)_j v_j

over the slots j of the query's own key head. Where there is no slot to see, the output is zero
and the log-sum-exp is -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ragged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """``q`` [B, H, R, d], ``k`` [S, d], ``v`` [S, dv] -> [B, H, R, dv] and LSE [B, H, R]."""
    batch, heads, rows, _ = q.shape
    kv = (len(offsets) - 1) // max(batch, 1)
    out, lse = q.new_zeros(batch, heads, rows, v.shape[1]), q.new_zeros(batch, heads, rows)
    for b in range(batch):
        for h in range(heads):
            segment = b * kv + h // (heads // kv)
            first = int(offsets[segment])
            count = int(offsets[segment + 1]) - first
            count = count if lengths is None else int(lengths[segment])
            for r in range(rows):
                seen = max(0, count - rows + r + 1) if causal else count
                slots = slice(first, first + seen)
                s = k[slots] @ q[b, h, r] * scale
                s = softcap * torch.tanh(s / softcap) if softcap else s
                s = s if bias is None else s + bias[slots]
                lse[b, h, r] = torch.logsumexp(s, 0)
                if not lse[b, h, r].isneginf():
                    out[b, h, r] = s.softmax(0) @ v[slots]
    return out, lse


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, per_channel: bool
) -> Tensor:
    """``codes`` uint8 [S, d * bits / 8] -> [S, d], one number after the other."""
    slots, width = codes.shape
    per_byte = 8 // bits
    out = scale.new_zeros(slots, width * per_byte)
    for n in range(slots):
        for c in range(width * per_byte):
            byte = int(codes[n, c % width])  # a byte holds channels c, c + width, ...
            code = byte >> bits * (c // width) & (1 << bits) - 1
            at = (n // group, c) if per_channel else (n, c // group)
            out[n, c] = code * scale[at] + zero[at]
    return out


def ragged_decode_quantized(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    bits: tuple[int, int],
    groups: tuple[int, int],
    per_channel: tuple[bool, bool],
    **rest: object,
) -> tuple[Tensor, Tensor]:
    """Written out in the dtype of the scales, then as above; pairs are (keys, values)."""
    keys = dequantize(k, k_scale, k_zero, bits[0], groups[0], per_channel[0])
    values = dequantize(v, v_scale, v_zero, bits[1], groups[1], per_channel[1])
    return ragged_decode(q, keys, values, **rest)  # type: ignore[arg-type]
