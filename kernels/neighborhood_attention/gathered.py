# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of tensors that are not finite: neighbour by neighbour, nothing masked.

The other paths multiply more keys than a window has and give those outside weight zero; zero times
NaN is NaN, so one broken token would spoil the queries around its window too. What comes out shows
it (:func:`spoiled`), and is computed again here, where a query meets its own neighbours alone. That
is slow, and so only the way of what is broken; on a GPU nobody looks, as that waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from visprune.kernels.common.precision import wide

from .axis import Axis, Layout, product

MAX_GATHERED = 1 << 20  # numbers of gathered keys held at once


def spoiled(layout: Layout, *results: Tensor) -> bool:
    """Whether a result is not finite and may have come from outside a window."""
    if all(a.kernel == a.length and not a.causal for a in layout):
        return False  # all see all
    return any(t.is_cpu and not finite(t) for t in results)


def finite(t: Tensor) -> bool:
    """Whether all is finite."""
    flat = wide(t).reshape(-1)
    # A product of BLAS is one pass, and finite with its terms; where it overflows, look at each.
    return math.isfinite(torch.dot(flat, flat).item()) or bool(t.isfinite().all())


def _places(axis: Axis) -> tuple[Tensor, Tensor]:
    """Position of the neighbours along an axis, and their bias index: [L, k], -1 for none."""
    key = torch.full((axis.length, axis.kernel), -1, device="cpu")
    bias = key.clone()
    for group, groups, count in axis.groups():
        for place in range(count):
            near = torch.arange(*axis.window(place, count), device="cpu")
            for first in range(group, group + groups):
                row = first + axis.dilation * place
                key[row, : len(near)] = first + axis.dilation * near
                bias[row, : len(near)] = near - place + axis.kernel - 1
    return key, bias


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _neighbours(layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Flat position and bias index of every neighbour, and whether it exists: [N, K] each."""
    key = bias = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    there = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for axis in layout:
        own_key, own_bias = _places(axis)
        shape = (len(key) * axis.length, key.shape[1] * axis.kernel)
        key = key[:, None, :, None] * axis.length + own_key.clamp_min(0)[None, :, None, :]
        bias = bias[:, None, :, None] * (2 * axis.kernel - 1) + own_bias.clamp_min(0)[:, None]
        there = there[:, None, :, None] & (own_key >= 0)[None, :, None, :]
        key, bias, there = (t.reshape(shape) for t in (key, bias, there))
    return key, bias, there


def _rows(t: Tensor) -> Tensor:
    """[B, *space, H, D] -> [B, H, N, D] in fp32 at least."""
    return wide(t).flatten(1, -3).transpose(1, 2)


def _back(t: Tensor, like: Tensor) -> Tensor:
    """[B, H, N, x] -> [B, *space, H, x]."""
    return t.transpose(1, 2).reshape(*like.shape[:-1], t.shape[-1])


def _slices(layout: Layout, like: Tensor) -> Iterator[slice]:
    """Queries so few at a time that their gathered keys fit."""
    each = like.shape[0] * like.shape[1] * like.shape[3] * product(a.kernel for a in layout)
    step = max(1, MAX_GATHERED // max(1, each))
    return (slice(i, i + step) for i in range(0, like.shape[2], step))


def _near(t: Tensor, key: Tensor, there: Tensor) -> Tensor:
    """Rows of the neighbours of some queries, zeros where there is none: [B, H, n, K, D]."""
    return t[:, :, key].masked_fill(~there[..., None], 0.0)


def _scores(
    q: Tensor, k: Tensor, rpb: Tensor | None, bias: Tensor, there: Tensor, scale: float
) -> Tensor:
    """``q`` [B, H, n, D] with gathered keys [B, H, n, K, D] -> [B, H, n, K]."""
    s = (q[:, :, :, None] * k).sum(-1) * scale
    if rpb is not None:
        s = s + wide(rpb).flatten(1)[:, bias]
    return s.masked_fill(~there, -torch.inf)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [B, *space, H, Dv] and LSE [B, *space, H], both in fp32 (or fp64)."""
    qs, ks, vs = _rows(q), _rows(k), _rows(v)
    out, lse = qs.new_empty(*qs.shape[:3], vs.shape[3]), qs.new_empty(qs.shape[:3])
    key, bias, there = _neighbours(layout)
    for at in _slices(layout, ks if ks.shape[3] > vs.shape[3] else vs):
        s = _scores(qs[:, :, at], _near(ks, key[at], there[at]), rpb, bias[at], there[at], scale)
        p = torch.softmax(s, -1).masked_fill(~there[at], 0.0)
        out[:, :, at] = (p[..., None] * _near(vs, key[at], there[at])).sum(-2)
        lse[:, :, at] = torch.logsumexp(s, -1)
    return _back(out, q), _back(lse[..., None], q)[..., 0]


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    rpb: Tensor | None, out: Tensor, lse: Tensor, layout: Layout, scale: float, rpb_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the bias, from the LSE over all keys."""
    gs, qs, ks, vs, outs = (_rows(t) for t in (grad_out, q, k, v, out))
    norm = _rows(lse[..., None])
    delta = (gs * outs).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - _rows(grad_lse[..., None])
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (qs, ks, vs))
    grad_rpb = None
    if rpb is not None and rpb_grad:
        grad_rpb = torch.zeros_like(wide(rpb)).flatten(1)
    key, bias, there = _neighbours(layout)
    for at in _slices(layout, ks if ks.shape[3] > vs.shape[3] else vs):
        near, real = _near(ks, key[at], there[at]), there[at]
        s = _scores(qs[:, :, at], near, rpb, bias[at], real, scale)
        p = torch.exp(s - norm[:, :, at]).masked_fill(~real, 0.0)
        grad_p = (gs[:, :, at, None] * _near(vs, key[at], real)).sum(-1)
        ds = (p * (grad_p - delta[:, :, at])).masked_fill(~real, 0.0)
        grad_q[:, :, at] = (ds[..., None] * near).sum(-2) * scale
        _give(grad_k, key[at], real, ds[..., None] * qs[:, :, at, None] * scale)
        _give(grad_v, key[at], real, p[..., None] * gs[:, :, at, None])
        if grad_rpb is not None:
            grad_rpb.index_add_(1, bias[at].flatten(), ds.sum(0).flatten(1))
    grads = (_back(grad_q, q), _back(grad_k, k), _back(grad_v, v))
    return *grads, None if grad_rpb is None or rpb is None else grad_rpb.view(rpb.shape)


def _give(total: Tensor, key: Tensor, there: Tensor, parts: Tensor) -> None:
    """Add [B, H, n, K, D] to the neighbours in ``total`` [B, H, N, D]."""
    parts = parts.masked_fill(~there[..., None], 0.0)
    total.index_add_(2, key.flatten(), parts.flatten(2, 3))


def av(attn: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Weights [B, *space, H, K] times the values of the neighbours -> [B, *space, H, Dv]."""
    weights, vs = _rows(attn), _rows(v)
    out = torch.empty_like(vs)
    key, _, there = _neighbours(layout)
    for at in _slices(layout, vs):
        used = weights[:, :, at].masked_fill(~there[at], 0.0)
        out[:, :, at] = (used[..., None] * _near(vs, key[at], there[at])).sum(-2)
    return _back(out, v).to(v.dtype)


def spread(attn: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The transpose of :func:`av`."""
    weights, xs = _rows(attn), _rows(x)
    out = torch.zeros_like(xs)
    key, _, there = _neighbours(layout)
    for at in _slices(layout, xs):
        _give(out, key[at], there[at], weights[:, :, at, :, None] * xs[:, :, at, None])
    return _back(out, x).to(x.dtype)
