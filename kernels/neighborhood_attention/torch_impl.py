# SPDX-License-Identifier: Apache-2.0
"""PyTorch path: tiles of queries against their halo of keys, exact, never N x N.

Small pictures go through PyTorch's fused attention instead (:mod:`.bands`). Otherwise every tile of
queries is one small matrix product with the box of keys that its windows cover; dilation groups are
separate images, tiles whose windows lie alike share one mask. Work goes through in parts of fixed
size (:mod:`.tiles`), so memory beyond the results does not grow with N.
PyTorch's own CPU flash kernel on 8 x 8 tiles is slower (4.0 against 3.4 ms at 56 x 56, two threads)
and gives no gradient of the bias.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from visprune.kernels.common.precision import wide

from . import bands, gathered, tiles, whole_groups
from .axis import Layout, product
from .tiles import Part, Scratch


def _plan(t: Tensor, layout: Layout, dim: int) -> tuple:
    return tiles.plan(layout, t.shape[0], t.shape[-2], dim, tiles.MAX_HELD)


def _scratch(plan: tuple, like: Tensor, dim: int, value_dim: int, backward: bool) -> Scratch:
    """Room for the largest part: queries, halos, scores, probabilities, what comes of them."""
    most = 0
    for _, parts in plan:
        if not parts:  # no pictures
            continue
        part = parts[0]  # the others are no larger
        rows, halo = part.tile * (dim + value_dim), part.span * (dim + value_dim)
        pairs = part.tile * part.span
        each = 2 * rows + 2 * halo + 4 * pairs if backward else rows + halo + 2 * pairs
        most = max(most, part.cells_of_heads * each)
    return Scratch(most + 16 * 12, like.dtype, like.device)


def _scores(
    part: Part, qt: Tensor, kt: Tensor, table: Tensor | None, scale: float,
    scratch: Scratch | None = None,
) -> Tensor:  # fmt: skip
    """``scale * q k^T + bias`` of every tile -> [tiles, images * groups * H, tile, span]."""
    size = (*qt.shape[:-1], part.span)
    s = qt.new_empty(size) if scratch is None else scratch.take(size)
    if table is None:
        s.copy_(part.mask(qt))
    else:
        part.by_class(table, out=s)
    s.flatten(0, 1).baddbmm_(qt.flatten(0, 1), kt.flatten(0, 1).mT, alpha=scale)
    return s


def _bmm(a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
    """``scale * a b`` of [tiles, n, x, y] and [tiles, n, y, z], the scale inside the product."""
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=0, alpha=scale)
    return out


def _lse(s: Tensor, p: Tensor) -> Tensor:
    """Log-sum-exp of rows from their softmax: p_max = exp(s_max - lse)."""
    return s.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()


def band_count(q: Tensor, v: Tensor, layout: Layout, biased: bool) -> int:
    """Bands of the path of small pictures (:mod:`.bands`); 0 where tiles are the way."""
    if q.device.type != "cpu" or q.shape[-1] != v.shape[-1] or q.numel() == 0:
        return 0
    return bands.chosen(layout, q.shape[0], q.shape[-2], biased)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, layout: Layout, scale: float,
    out_dtype: torch.dtype, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, *space, H, Dv] in ``out_dtype``, LSE [B, *space, H] in fp32 (or fp64).

    Without ``with_lse``, where computing it is work, the second is zeros.
    """
    inner = whole_groups.covered(layout) if q.is_cpu else None
    if inner is not None:
        q, k, v = (whole_groups.apart(t, layout) for t in (q, k, v))
        found = forward(q, k, v, rpb, inner, scale, out_dtype, with_lse)
        return whole_groups.together(found[0], layout), whole_groups.together(found[1], layout)
    out, lse = _forward(q, k, v, rpb, layout, scale, out_dtype, with_lse)
    if gathered.spoiled(layout, out):
        out, lse = gathered.forward(q, k, v, rpb, layout, scale)
    return out.to(out_dtype), lse


def _forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, layout: Layout, scale: float,
    out_dtype: torch.dtype, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    count = band_count(q, v, layout, rpb is not None)
    if count:
        out, lse = bands.forward(q, k, v, rpb, layout, scale, count)
        return out, lse
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype, device=q.device)
    lse = (torch.empty if with_lse else torch.zeros)(q.shape[:-1], dtype=dtype, device=q.device)
    plan = _plan(q, layout, max(q.shape[-1], v.shape[-1]))
    scratch = _scratch(plan, lse, q.shape[-1], v.shape[-1], backward=False)
    for chosen, parts in plan:
        table = None if rpb is None else tiles.bias(chosen, rpb, lse)
        for part in parts:
            scratch.begin()
            qt = part.queries(q, dtype, scratch)
            kt, vt = part.keys(k, dtype, scratch), part.keys(v, dtype, scratch)
            s = _scores(part, qt, kt, table, scale, scratch)
            p = torch.softmax(s, -1, out=scratch.take(s.shape))
            part.store(out, _bmm(p, vt, out=scratch.take((*qt.shape[:-1], vt.shape[-1]))))
            if with_lse:
                part.store(lse[..., None], _lse(s, p))
    return out, lse


def row_terms(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor) -> Tensor:
    """What the softmax takes off the gradient of every score of a row, [B, *space, H]."""
    delta = (wide(grad_out) * wide(out)).sum(-1)
    return delta if grad_lse is None else delta - grad_lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    rpb: Tensor | None, out: Tensor, lse: Tensor, layout: Layout, scale: float, rpb_grad: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the bias; the probabilities are computed again tile by tile.

    ``shared``: the softmax was over additional keys too, so it is less than one over neighbours.
    """
    inner = whole_groups.covered(layout) if q.is_cpu else None
    if inner is not None:
        grad_out, q, k, v, out, lse = (
            whole_groups.apart(t, layout) for t in (grad_out, q, k, v, out, lse)
        )
        grad_lse = None if grad_lse is None else whole_groups.apart(grad_lse, layout)
        args = (grad_out, grad_lse, q, k, v, rpb, out, lse, inner, scale, rpb_grad)
        parts = backward(*args, shared)
        grad_q, grad_k, grad_v = (whole_groups.together(t, layout) for t in parts[:3])
        return grad_q, grad_k, grad_v, parts[3]
    args = (grad_out, grad_lse, q, k, v, rpb, out, lse, layout, scale, rpb_grad)
    grads = _backward(*args, shared)
    if gathered.spoiled(layout, *grads[:3]):
        if not shared:  # the stored one may be zeros
            args = (*args[:7], gathered.forward(q, k, v, rpb, layout, scale)[1], *args[8:])
        return gathered.backward(*args)
    return grads


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    rpb: Tensor | None, out: Tensor, lse: Tensor, layout: Layout, scale: float, rpb_grad: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    # The fused kernel takes no gradient of the log-sum-exp and gives none of the bias; it works
    # with the stored output, which half types have rounded.
    plain = not shared and grad_lse is None and not rpb_grad and q.dtype.itemsize >= 4
    count = band_count(q, v, layout, rpb is not None) if plain else 0
    if count:
        args = (grad_out, q, k, v, rpb, out, lse, layout, scale, count)
        return *bands.backward(*args), None
    dtype, heads = torch.promote_types(q.dtype, torch.float32), q.shape[-2]
    delta = row_terms(grad_out, grad_lse, out) if shared else None
    grad_q = torch.empty(q.shape, dtype=dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (k, v))
    grad_rpb = None
    if rpb is not None and rpb_grad:
        grad_rpb = grad_q.new_zeros(heads, product(2 * a.kernel for a in layout))
    plan = _plan(q, layout, max(q.shape[-1], v.shape[-1]))
    scratch = _scratch(plan, grad_q, q.shape[-1], v.shape[-1], backward=True)
    for chosen, parts in plan:
        table = None if rpb is None else tiles.bias(chosen, rpb, grad_q)
        sums = None if grad_rpb is None or table is None else torch.zeros_like(table)
        for part in parts:
            scratch.begin()
            qt, gt = part.queries(q, dtype, scratch), part.queries(grad_out, dtype, scratch)
            kt, vt = part.keys(k, dtype, scratch), part.keys(v, dtype, scratch)
            # Not exp(s - lse): MKL's exp takes 5 times longer at -inf, and its sum is less exact.
            s = _scores(part, qt, kt, table, scale, scratch)
            p = torch.softmax(s, -1, out=scratch.take(s.shape))
            ds = _bmm(gt, vt.mT, out=scratch.take(s.shape))
            if delta is not None:
                p *= torch.exp(_lse(s, p) - part.queries(lse[..., None], dtype))
                ds = ds.sub_(part.queries(delta[..., None], dtype)).mul_(p)
            else:
                room = scratch.take(s.shape)
                ds = torch.ops.aten._softmax_backward_data.out(ds, p, -1, dtype, grad_input=room)
                if grad_lse is not None:
                    ds.addcmul_(p, part.queries(grad_lse[..., None], dtype))
            if sums is not None:
                part.add_by_class(sums, ds)
            part.store(grad_q, _bmm(ds, kt, scale, scratch.take(qt.shape)))
            if q.shape[-1] == v.shape[-1]:
                both = scratch.take((2, *kt.shape))
                _bmm(ds.mT, qt, scale, both[0])
                _bmm(p.mT, gt, 1.0, both[1])
                part.fold((grad_k, grad_v), both)
            else:
                part.fold((grad_k,), _bmm(ds.mT, qt, scale))
                part.fold((grad_v,), _bmm(p.mT, gt))
        if grad_rpb is not None and sums is not None:
            tiles.add_by_index(grad_rpb, tiles.bias_index(chosen), sums)
    if grad_rpb is not None:
        grad_rpb = tiles.unpadded(grad_rpb, layout)
    return grad_q, grad_k, grad_v, grad_rpb


# --- unfused --------------------------------------------------------------------------------------


def _dense(part: Part, attn: Tensor, near: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of the neighbours, [B, *space, H, K], at their places of the span, zeros between."""
    weights = part.queries(attn, dtype)
    index = near.masked_fill(~there, part.span).unsqueeze(-3)  # one more place takes what is none
    index = part.by_class(index).expand(weights.shape)
    out = weights.new_zeros(*weights.shape[:-1], part.span + 1).scatter_(-1, index, weights)
    return out[..., : part.span]


def qk(q: Tensor, k: Tensor, rpb: Tensor | None, layout: Layout, scale: float) -> Tensor:
    """Scores of each query with its K neighbours -> [B, *space, H, K]; -inf where none is."""
    like = wide(q[:0])
    out = q.new_empty(*q.shape[:-1], product(a.kernel for a in layout))
    for chosen, parts in _plan(q, layout, q.shape[-1]):
        table = None if rpb is None else tiles.bias(chosen, rpb, like)
        near, there = (t.to(q.device).unsqueeze(-3) for t in tiles.near(chosen))
        for part in parts:
            qt, kt = part.queries(q, like.dtype), part.keys(k, like.dtype)
            s = _scores(part, qt, kt, table, scale)
            at = part.by_class(near).expand(*s.shape[:-1], near.shape[-1])
            part.store(out, s.gather(-1, at).masked_fill_(~part.by_class(there), -torch.inf))
    return out


def av(attn: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Weights [B, *space, H, K] times the values of the neighbours -> [B, *space, H, Dv]."""
    dtype = wide(v[:0]).dtype
    out = v.new_empty(*attn.shape[:-1], v.shape[-1])
    for chosen, parts in _plan(v, layout, v.shape[-1]):
        near, there = (t.to(v.device) for t in tiles.near(chosen))
        for part in parts:
            part.store(out, _dense(part, attn, near, there, dtype) @ part.keys(v, dtype))
    return gathered.av(attn, v, layout) if gathered.spoiled(layout, out) else out


def spread(attn: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The transpose of :func:`av`: each row of ``x`` goes, weighted, to its neighbours."""
    dtype = wide(x[:0]).dtype
    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for chosen, parts in _plan(x, layout, x.shape[-1]):
        near, there = (t.to(x.device) for t in tiles.near(chosen))
        for part in parts:
            weights = _dense(part, attn, near, there, dtype)
            part.fold((out,), weights.mT @ part.queries(x, dtype))
    out = out.to(x.dtype)
    return gathered.spread(attn, x, layout) if gathered.spoiled(layout, out) else out


def bias_grad(grad: Tensor, layout: Layout) -> Tensor:
    """Sum of ``grad`` [B, *space, H, K] over the pairs of each offset -> [H, 2 k - 1, ...]."""
    heads, dtype = grad.shape[-2], wide(grad[:0]).dtype
    total = grad.new_zeros(heads, product(2 * a.kernel for a in layout), dtype=dtype)
    for chosen, parts in _plan(grad, layout, grad.shape[-1]):
        near, there = tiles.near(chosen)
        index = tiles.bias_index(chosen).gather(-1, near).to(grad.device)
        sums = total.new_zeros(*index.shape[:-2], heads, *index.shape[-2:])
        for part in parts:
            part.add_by_class(sums, part.queries(grad, dtype))
        sums.masked_fill_(~there.to(grad.device).unsqueeze(-3), 0.0)
        tiles.add_by_index(total, index, sums)
    return tiles.unpadded(total, layout)


# --- additional keys ------------------------------------------------------------------------------


def _slices(n: int, heads: int, batch: int, keys: int) -> Iterator[slice]:
    step = max(1, tiles.MAX_HELD // max(1, heads * batch * keys))
    return (slice(i, i + step) for i in range(0, n, step))


def _rows(t: Tensor) -> Tensor:
    """[B, *space, H, D] -> [B, H, N, D]."""
    return t.flatten(1, -3).transpose(1, 2)


def extra_forward(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every query to M additional keys -> output and LSE, fp32 (or fp64)."""
    qs, kt, vt = _rows(q), wide(keys).permute(0, 2, 3, 1), wide(values).transpose(1, 2)
    out = vt.new_empty(*qs.shape[:3], vt.shape[-1])
    lse = vt.new_empty(qs.shape[:3])
    for at in _slices(qs.shape[2], qs.shape[1], len(qs), kt.shape[-1]):
        s = wide(qs[:, :, at]) @ kt * scale
        lse[:, :, at] = torch.logsumexp(s, -1)
        out[:, :, at] = torch.exp(s - lse[:, :, at, None]) @ vt
    out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    return out.reshape(*q.shape[:-1], vt.shape[-1]), lse.reshape(q.shape[:-1])


def extra_backward(
    grad_out: Tensor, q: Tensor, keys: Tensor, values: Tensor, lse: Tensor, delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q and of the additional keys and values, from the LSE over all keys."""
    qs, gs = _rows(q), _rows(grad_out)
    kt, vt = wide(keys).transpose(1, 2), wide(values).transpose(1, 2)
    grad_q = kt.new_empty(qs.shape)
    grad_k, grad_v = torch.zeros_like(kt), torch.zeros_like(vt)
    lses, deltas = _rows(lse[..., None]), _rows(delta[..., None])
    for at in _slices(qs.shape[2], qs.shape[1], len(qs), kt.shape[2]):
        query, grad = wide(qs[:, :, at]), wide(gs[:, :, at])
        p = torch.exp(query @ kt.mT * scale - lses[:, :, at])
        ds = p * (grad @ vt.mT - deltas[:, :, at]) * scale
        grad_q[:, :, at] = ds @ kt
        grad_k += ds.mT @ query
        grad_v += p.mT @ grad
    grad_k, grad_v = (g.transpose(1, 2).contiguous() for g in (grad_k, grad_v))
    back = grad_q.transpose(1, 2).reshape(q.shape)
    return back, grad_k.to(keys.dtype), grad_v.to(values.dtype)


def merge(out: Tensor, lse: Tensor, extra: Tensor, extra_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join two attentions of the same queries over disjoint keys by their log-sum-exps."""
    both = torch.logaddexp(lse, extra_lse)
    own, other = torch.exp(lse - both)[..., None], torch.exp(extra_lse - both)[..., None]
    return out * own + extra * other, both
