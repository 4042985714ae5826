# SPDX-License-Identifier: Apache-2.0
"""The truth for neighborhood attention: the index rule axis by axis, a dense mask, a softmax.

Per axis of length L, with kernel k, stride s, dilation d, for the query at position i::

    g, j = i % d, i // d                     dilation group, place in the group
    M = number of positions of the group     ceil((L - g) / d)
    plain    lead = min((j // s) * s + s // 2, M - 1)      leader of the stride group
             st = max(lead - k // 2, 0), moved left until the window ends inside; en = st + k
    causal   lead = min((j // s) * s + s - 1, M - 1)
             st = max(lead - k + 1, 0); en = j + 1
    neighbours = g + d * t for t in st .. en - 1

The neighbourhood of a query is the product of those of its axes (arXiv 2204.07143; dilation
2209.15001; stride 2504.16922). The bias of axis offset t - j is ``rpb[..., t - j + k - 1]``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def axis_window(
    i: int, length: int, kernel: int, stride: int, dilation: int, causal: bool
) -> tuple[int, int]:
    """(st, en) of the query at position ``i``, in places of its dilation group."""
    group, place = i % dilation, i // dilation
    count = (length - group + dilation - 1) // dilation
    first = place // stride * stride
    if causal:
        lead = min(first + stride - 1, count - 1)
        return max(lead - kernel + 1, 0), min(place + 1, count)
    lead = min(first + stride // 2, count - 1)
    start = max(lead - kernel // 2, 0)
    right = kernel // 2 - 1 + kernel % 2  # an even kernel has one more on the left
    if lead + right >= count:
        start += count - right - lead - 1
    return start, start + kernel


def axis_offsets(
    length: int, kernel: int, stride: int, dilation: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Key position and bias index of every query's k neighbours -> two int64 [L, k]; -1: none."""
    keys = torch.full((length, kernel), -1)
    bias = torch.full((length, kernel), -1)
    for i in range(length):
        start, end = axis_window(i, length, kernel, stride, dilation, causal)
        for n, t in enumerate(range(start, end)):
            keys[i, n] = i % dilation + t * dilation
            bias[i, n] = t - i // dilation + kernel - 1
    return keys, bias


def tables(
    space: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours of every query: flat key [N, K], flat bias index [N, K], exists [N, K]."""
    key = bias = torch.zeros(1, 1, dtype=torch.long)
    valid = torch.ones(1, 1, dtype=torch.bool)
    for args in zip(space, kernel_size, stride, dilation, is_causal, strict=True):
        length, kernel = args[0], args[1]
        axis_key, axis_bias = axis_offsets(*args)
        shape = (len(key) * length, key.shape[1] * kernel)
        key = (key[:, None, :, None] * length + axis_key[None, :, None, :]).reshape(shape)
        bias = bias[:, None, :, None] * (2 * kernel - 1) + axis_bias[None, :, None, :]
        bias = bias.reshape(shape)
        valid = (valid[:, None, :, None] & (axis_key >= 0)[None, :, None, :]).reshape(shape)
    return key, bias, valid


def _flat(t: Tensor) -> Tensor:
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
    is_causal: Sequence[bool],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``q``, ``k``, ``v`` [B, *space, H, D] -> output [B, *space, H, Dv], LSE [B, *space, H]."""
    space = q.shape[1:-2]
    key, bias, valid = (
        t.to(q.device) for t in tables(space, kernel_size, stride, dilation, is_causal)
    )
    n, heads = math.prod(space), q.shape[-2]
    query = torch.arange(n, device=q.device)[:, None].expand_as(key)
    seen = torch.zeros(n, n, dtype=torch.bool, device=q.device)
    seen[query[valid], key[valid]] = True
    s = _flat(q) @ _flat(k).transpose(2, 3) * scale
    if rpb is not None:
        # Dense biases [H, N, N]; a pair that is no neighbour reads any entry, and is masked.
        index = torch.zeros(n, n, dtype=torch.long, device=q.device)
        index[query[valid], key[valid]] = bias[valid]
        s = s + rpb.reshape(heads, -1)[:, index]
    s = s.masked_fill(~seen, -torch.inf)
    values = _flat(v)
    if additional_keys is not None and additional_values is not None:
        extra = _flat(q) @ additional_keys.permute(0, 2, 3, 1) * scale
        s = torch.cat([s, extra], -1)
        values = torch.cat([values, additional_values.transpose(1, 2)], 2)
    out = torch.softmax(s, -1) @ values
    lse = torch.logsumexp(s, -1).transpose(1, 2)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1]), lse.reshape(q.shape[:-1])


def na_qk(
    q: Tensor,
    k: Tensor,
    rpb: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
) -> Tensor:
    """Scores of every query with its neighbours, row by row -> [B, *space, H, K]; -inf: none."""
    space = q.shape[1:-2]
    key, bias, valid = (
        t.to(q.device) for t in tables(space, kernel_size, stride, dilation, is_causal)
    )
    near = k.flatten(1, -3)[:, key]  # [B, N, K, H, D]
    s = torch.einsum("bnhd,bnkhd->bnhk", q.flatten(1, -3), near) * scale
    if rpb is not None:
        s = s + rpb.reshape(len(rpb), -1)[:, bias].transpose(0, 1)
    s = s.masked_fill(~valid[:, None], -torch.inf)
    return s.reshape(*q.shape[:-1], key.shape[1])


def na_av(
    attn: Tensor,
    v: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Tensor:
    """Weighted sum of every query's neighbours; what stands where none is does not count."""
    space = v.shape[1:-2]
    key, _, valid = (
        t.to(v.device) for t in tables(space, kernel_size, stride, dilation, is_causal)
    )
    weight = attn.flatten(1, -3).masked_fill(~valid[:, None], 0.0)
    out = torch.einsum("bnhk,bnkhd->bnhd", weight, v.flatten(1, -3)[:, key])
    return out.reshape(*attn.shape[:-1], v.shape[-1])


def seen_keys(
    query: Sequence[int],
    space: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> list[tuple[int, ...]]:
    """Positions of the keys that one query sees, in row-major order."""
    axes = []
    for i, *args in zip(query, space, kernel_size, stride, dilation, is_causal, strict=True):
        start, end = axis_window(i, *args)
        axes.append([i % args[3] + t * args[3] for t in range(start, end)])
    return list(itertools.product(*axes))
