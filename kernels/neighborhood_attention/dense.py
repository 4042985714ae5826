# SPDX-License-Identifier: Apache-2.0
"""The whole operator in plain operators of PyTorch: N x N scores under a mask.

For gradients of gradients and for export. The rule is that of ``reference.py`` without a loop and
without an index that depends on values, so a graph of it serves all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .axis import product


def _axis(
    length: int, kernel: int, stride: int, dilation: int, causal: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Whether a query (row) sees a key, and the bias index of the pair: [L, L] each."""
    at = torch.arange(length, device=device)
    group, place = at % dilation, at // dilation
    count = (length - group + dilation - 1) // dilation
    first = place - place % stride
    if causal:
        lead = torch.minimum(first + stride - 1, count - 1)
        start, end = (lead - kernel + 1).clamp_min(0), place + 1
    else:
        lead = torch.minimum(first + stride // 2, count - 1)
        start = torch.minimum((lead - kernel // 2).clamp_min(0), count - kernel)
        end = start + kernel
    inside = (place >= start[:, None]) & (place < end[:, None])
    offset = place - place[:, None] + kernel - 1
    return inside & (group == group[:, None]), offset.clamp(0, 2 * kernel - 2)


def _rows(t: Tensor) -> Tensor:
    """[B, *space, H, D] -> [B, H, N, D]."""
    return t.flatten(1, -3).transpose(1, 2)


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``q``, ``k``, ``v`` [B, *space, H, D] -> output [B, *space, H, Dv], LSE [B, *space, H]."""
    space = q.shape[1:-2]
    seen = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
    for length, kernel, *rest in zip(space, kernel_size, stride, dilation, is_causal, strict=True):
        own, offset = _axis(length, kernel, rest[0], rest[1], bool(rest[2]), q.device)
        shape = (seen.shape[0] * length, seen.shape[1] * length)
        seen = (seen[:, None, :, None] & own[:, None]).reshape(shape)
        index = (index[:, None, :, None] * (2 * kernel - 1) + offset[:, None]).reshape(shape)
    s = _rows(q) @ _rows(k).transpose(2, 3) * scale
    if rpb is not None:
        table = rpb.reshape(rpb.shape[0], product(rpb.shape[1:]))
        s = s + table.index_select(1, index.flatten()).view(-1, *index.shape)
    s, values = s.masked_fill(~seen, -torch.inf), _rows(v)
    if additional_keys is not None and additional_values is not None:
        s = torch.cat([s, _rows(q) @ additional_keys.permute(0, 2, 3, 1) * scale], -1)
        values = torch.cat([values, additional_values.transpose(1, 2)], 2)
    out = (torch.softmax(s, -1) @ values).transpose(1, 2)
    lse = torch.logsumexp(s, -1).transpose(1, 2)
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])
