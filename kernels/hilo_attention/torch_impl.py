# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of HiLo attention: batched matrix products or fused attention, by size."""

from __future__ import annotations

import torch
from torch import Tensor

from visprune.kernels.common.precision import wide

# Up to this many keys two products and a softmax are faster than PyTorch's fused CPU kernel, as
# long as the scores stay in cache: 1.1 to 1.3 times at 49 keys and 49 or 196 queries (two AVX2
# threads, torch 2.14). Over 784 queries and more the fused kernel is 1.1 to 1.4 times as fast from
# 49 keys on, but there its gradient of the queries can be off by twice the error of plain code.
PLAIN_KEYS = 100
MAX_SCORES = 1 << 18  # scores held at once (fp32: 1 MiB)
# Softmax over short rows costs more than both products of a small window; along a dimension that
# is not the last one it is vectorised across queries, so few keys come first.
KEYS_FIRST = 32
# Where gradients will be taken, so many probabilities are kept for them (fp32: 16 MiB) and not
# computed again.
MAX_KEPT = 1 << 22


def fused(keys: int, like: Tensor) -> bool:
    """Whether this many keys go through PyTorch's fused CPU attention."""
    return keys > PLAIN_KEYS and like.device.type == "cpu"


def group_step(q: Tensor, k: Tensor) -> int:
    """How many groups at a time, so that their scores fit."""
    return max(1, MAX_SCORES // max(1, q.shape[1] * k.shape[1]))


def probabilities(
    q: Tensor, k: Tensor, scale: float, hide: Tensor | None, place: Tensor | None = None
) -> tuple[Tensor, int]:
    """Softmax over the keys of each group and their dimension: [g, m, n], 1 or [g, n, m], 2.

    Into ``place`` [g, n * m], where that is given.
    """
    keys_first = k.shape[1] <= KEYS_FIRST
    first, second = (k, q) if keys_first else (q, k)
    none = q.new_empty(1, 1, 1)
    s = torch.baddbmm(none, first, second.transpose(1, 2), beta=0, alpha=scale)
    if hide is not None:
        s = s.masked_fill_(hide[:, :, None] if keys_first else hide[:, None, :], -torch.inf)
    dim = 1 if keys_first else 2
    if place is None:
        return torch.softmax(s, dim), dim
    return torch.softmax(s, dim, out=place.view(s.shape)), dim


def known(kept: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, int]:
    """What :func:`probabilities` gave, of what it wrote [g, n * m]."""
    n, m = q.shape[1], k.shape[1]
    return (kept.view(-1, m, n), 1) if m <= KEYS_FIRST else (kept.view(-1, n, m), 2)


def queries_first(t: Tensor, dim: int) -> Tensor:
    """[g, n, m] of what has its keys along ``dim``."""
    return t.transpose(1, 2) if dim == 1 else t


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hide: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``q`` [G, n, d], ``k`` and ``v`` [G, m, d], ``hide`` bool [G, m] -> [G, n, d].

    ``keep`` [G, n * m] takes the probabilities.
    """
    step = group_step(q, k)
    if len(q) <= step:
        return torch.bmm(queries_first(*probabilities(q, k, scale, hide, keep)), v)
    out = q.new_empty(q.shape)
    for start in range(0, len(q), step):
        g = slice(start, start + step)
        p = probabilities(q[g], k[g], scale, part(hide, g), part(keep, g))
        torch.bmm(queries_first(*p), v[g], out=out[g])
    return out


def part(t: Tensor | None, groups: slice) -> Tensor | None:
    """Some of what there is for every group, if there is."""
    return None if t is None else t[groups]


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, hide: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v of :func:`attend`; ``kept`` [G, n * m]: its probabilities."""
    found = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    step = group_step(q, k)
    for start in range(0, len(q), step):
        g = slice(start, start + step)
        if kept is None:
            p, dim = probabilities(q[g], k[g], scale, part(hide, g))
        else:
            p, dim = known(kept[g], q, k)
        first, second = (v[g], grad[g]) if dim == 1 else (grad[g], v[g])
        grad_p = torch.bmm(first, second.transpose(1, 2))
        # One pass; written out it is four, and slower than the official module's own gradient.
        grad_s = torch._softmax_backward_data(grad_p, p, dim, p.dtype)
        p, grad_s = queries_first(p, dim), queries_first(grad_s, dim)
        found[0][g].baddbmm_(grad_s, k[g], beta=0, alpha=scale)
        found[1][g].baddbmm_(grad_s.transpose(1, 2), q[g], beta=0, alpha=scale)
        torch.bmm(p.transpose(1, 2), grad[g], out=found[2][g])
    return found


def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v as one tensor [3, ...]: a view where they are the parts of one projection."""
    step = k.storage_offset() - q.storage_offset()
    same = q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    same = same and k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    if same and step > 0 and v.storage_offset() - k.storage_offset() == step:
        strides = q.stride()
        if strides == k.stride() == v.stride():
            return torch.as_strided(q, (3, *q.shape), (step, *strides))
    return torch.stack((q, k, v))


def grid(height: int, width: int, ws: int) -> tuple[int, int]:
    """Windows down and across."""
    return -(-height // ws), -(-width // ws)


def to_windows(t: Tensor, ws: int) -> Tensor:
    """[n, B, H, W, h, d] -> [n, B * windows * h, ws * ws, d]; H and W multiples of ``ws``."""
    n, b, height, width, heads, d = t.shape
    t = t.view(n, b, height // ws, ws, width // ws, ws, heads, d)
    return t.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(n, -1, ws * ws, d)


def padded(t: Tensor, ws: int, fill: Tensor | None) -> Tensor:
    """[B, H, W, h, d] with ``fill`` [h, d] or zeros right and below."""
    b, height, width, heads, d = t.shape
    rows, cols = grid(height, width, ws)
    whole = t.new_zeros(b, rows * ws, cols * ws, heads, d)
    if fill is not None:
        whole += fill.to(t.dtype)
    whole[:, :height, :width] = t
    return whole


def from_windows(t: Tensor, shape: torch.Size, ws: int) -> Tensor:
    """Inverse of :func:`to_windows` before cropping: [B, rows, ws, cols, ws, h, d], a view."""
    b, height, width, heads, d = shape
    rows, cols = grid(height, width, ws)
    return t.view(b, rows, cols, heads, ws, ws, d).permute(0, 1, 4, 2, 5, 3, 6)


def whole_image(t: Tensor) -> Tensor:
    """[B, rows, ws, cols, ws, h, d] -> [B, rows * ws, cols * ws, h, d]."""
    return t.flatten(3, 4).flatten(1, 2)


def hidden(shape: torch.Size, ws: int, device: torch.device) -> Tensor | None:
    """Padded keys of every window and head, bool [B * windows * h, ws * ws]; None without any."""
    b, height, width, heads, _ = shape
    rows, cols = grid(height, width, ws)
    if (rows * ws, cols * ws) == (height, width):
        return None
    y = torch.arange(rows * ws, device=device) >= height
    x = torch.arange(cols * ws, device=device) >= width
    out = (y[:, None] | x).view(rows, ws, cols, ws).transpose(1, 2)
    return out.reshape(rows * cols, 1, ws * ws).expand(b, -1, heads, -1).reshape(-1, ws * ws)


def window_inputs(
    q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
    ws: int, masked: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q, k, v as windows in fp32 [3, B * windows * h, ws * ws, d], and what to hide of them."""
    hide = hidden(q.shape, ws, q.device) if masked else None
    if q.shape[1] % ws or q.shape[2] % ws:
        fills = (None, None, None) if masked else (None, pad_k, pad_v)
        q, k, v = (padded(t, ws, fill) for t, fill in zip((q, k, v), fills, strict=True))
    return to_windows(wide(together(q, k, v)), ws), hide


def heads_first(t: Tensor) -> Tensor:
    """[B, H, W, h, d] -> [B, h, H * W, d]."""
    return t.flatten(1, 2).transpose(1, 2)


def num_kept(
    q: Tensor | None, low_q: Tensor | None, low_k: Tensor | None, ws: int
) -> tuple[int, int]:
    """How many probabilities of windows, and of the low branch, the backward will find.

    None beside the fused kernel, whose log-sum-exp is in their place, and none where both
    together are too many.
    """
    high = lows = 0
    if q is not None:
        b, height, width, heads, _ = q.shape
        rows, cols = grid(height, width, ws)
        high = b * rows * cols * heads * ws**4
    if low_q is not None and low_k is not None:
        b, height, width, heads, _ = low_q.shape
        keys = low_k.shape[1] * low_k.shape[2]
        if heads and fused(keys, low_q):
            return 0, 0
        lows = b * heads * height * width * keys
    return (high, lows) if high + lows <= MAX_KEPT else (0, 0)


def low(
    q: Tensor, k: Tensor, v: Tensor, scale: float, place: Tensor, keep: Tensor | None = None
) -> Tensor:
    """Lo-Fi heads into ``place`` [B, N, h, d]; the log-sum-exp of the fused kernel (else empty).

    ``keep`` [B * h * N * M] takes the probabilities, where that kernel is not taken.
    """
    q, k, v = heads_first(q), heads_first(k), heads_first(v)
    if fused(k.shape[2], q):
        fa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = fa(q, k, v, scale=scale)
        place.copy_(out.transpose(1, 2))
        return lse.contiguous()
    # Image by image, without a copy of the queries. The values are copied: rows that lie apart
    # slow the second product more than that costs.
    v = wide(v).contiguous()
    kept_of = None if keep is None else keep.view(len(q), q.shape[1], -1)
    for number, (one, *image) in enumerate(zip(place, q, k, v, strict=True)):
        qf, kf, vf = (wide(t) for t in image)
        own = None if kept_of is None else kept_of[number]
        one.copy_(attend(qf, kf, vf, scale, keep=own).transpose(0, 1))
    return v.new_empty(0)


def hilo_attention(
    q: Tensor | None, k: Tensor | None, v: Tensor | None,
    low_q: Tensor | None, low_k: Tensor | None, low_v: Tensor | None,
    pad_k: Tensor | None, pad_v: Tensor | None,
    ws: int, scale: float, masked: bool, keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, H, W, Hh + Hl, d] and what the backward is given.

    That is the log-sum-exp of the low branch (see ``low``), or with ``keep`` the probabilities of
    windows and low branch, as many as :func:`num_kept` says.
    """
    like = q if q is not None else low_q
    assert like is not None
    b, height, width, _, d = like.shape
    split = 0 if q is None else q.shape[3]
    heads = split + (0 if low_q is None else low_q.shape[3])
    out = like.new_empty(b, height, width, heads, d)
    lse = wide(like).new_empty(0)
    if out.numel() == 0:
        return out, lse
    counts = num_kept(q, low_q, low_k, ws) if keep else (0, 0)
    store = lse.new_empty(sum(counts))
    of_windows, of_low = store.split(list(counts))
    if q is not None and k is not None and v is not None and split:
        windows, hide = window_inputs(q, k, v, pad_k, pad_v, ws, masked)
        qw, kw, vw = windows.unbind(0)
        own = of_windows.view(len(qw), -1) if counts[0] else None
        got = from_windows(attend(qw, kw, vw, scale, hide, own), q.shape, ws)
        high = out[:, :, :, :split]
        if height % ws or width % ws:
            high.copy_(whole_image(got)[:, :height, :width])
        else:
            high.view(got.shape).copy_(got)
    if low_q is not None and low_k is not None and low_v is not None and heads > split:
        place = out.flatten(1, 2)[:, :, split:]
        lse = low(low_q, low_k, low_v, scale, place, of_low if counts[1] else None)
    return out, store if keep and not lse.numel() else lse


def high_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
    ws: int, scale: float, masked: bool, kept: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the padded key and value, in fp32; ``kept``: probabilities."""
    windows, hide = window_inputs(q, k, v, pad_k, pad_v, ws, masked)
    whole_grad = padded(grad, ws, None) if q.shape[1] % ws or q.shape[2] % ws else grad
    g = to_windows(wide(whole_grad)[None], ws)[0]
    qw, kw, vw = windows.unbind(0)
    own = None if kept is None else kept.view(len(qw), -1)
    parts = attend_backward(g, qw, kw, vw, scale, hide, own)
    whole = [whole_image(from_windows(t, q.shape, ws)) for t in parts]
    height, width = q.shape[1:3]
    inner: list[Tensor | None] = [t[:, :height, :width] for t in whole]
    for pad, t in ((pad_k, whole[1]), (pad_v, whole[2])):
        if pad is None or masked:
            inner.append(None if pad is None else torch.zeros_like(pad))
        else:
            inner.append(t[:, height:].sum((0, 1, 2)) + t[:, :height, width:].sum((0, 1, 2)))
    return inner


def low_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> list[Tensor | None]:
    """Gradients of the low branch, shaped like q, k and v; ``lse`` (or probabilities) as kept."""
    given = q, k, v
    grad, out, q, k, v = (heads_first(t) for t in (grad, out, q, k, v))
    if fused(k.shape[2], q):
        back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        parts = back(grad, q, k, v, out, lse, 0.0, False, scale=scale)
    else:
        # Of one image these are views: here rows that lie apart cost less than their copies.
        gf, qf, kf, vf = (wide(t).flatten(0, 1) for t in (grad, q, k, v))
        own = lse.view(len(qf), -1) if lse.numel() else None
        flat = attend_backward(gf, qf, kf, vf, scale, kept=own)
        parts = [t.view(s.shape) for t, s in zip(flat, (q, k, v), strict=True)]
    return [t.transpose(1, 2).reshape(s.shape) for t, s in zip(parts, given, strict=True)]
