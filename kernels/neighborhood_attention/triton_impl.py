# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path: a program owns one tile of queries (or keys) of one dilation group.

It walks in blocks over the box of keys that the windows of its queries cover (or over the box of
queries that see its keys) and masks by the windows themselves, which come from a table: st and en
of every query, and the interval of queries that see every key. All parameters of the rule meet in
that table; the kernels know none of them. One and two dimensions are three with axes of length 1.
No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import dot, launch, precision

from . import torch_impl
from .axis import Axis, Layout, product

# Queries and keys per block and axis, by dimensions and by lanes.
TILES = {
    64: {1: (1, 1, 64), 2: (1, 8, 8), 3: (4, 4, 4)},
    32: {1: (1, 1, 32), 2: (1, 4, 8), 3: (2, 4, 4)},
}
_FAR = tl.constexpr(1 << 30)
_DENSE = torch.contiguous_format


@triton.jit
def _place(pid, n0, n1, n2, d0, d1, d2):
    """Head and image, tile on each axis, dilation group on each axis, of a program."""
    g2 = pid % d2
    pid = pid // d2
    g1 = pid % d1
    pid = pid // d1
    g0 = pid % d0
    pid = pid // d0
    t2 = pid % n2
    pid = pid // n2
    t1 = pid % n1
    pid = pid // n1
    return (pid // n0).to(tl.int64), pid % n0, t1, t2, g0, g1, g2


@triton.jit
def _range(table, row, i0, i1, i2, l0, l1, l2, there):
    """First and end on each axis, for the positions of the lanes: rows ``row`` and ``row + 1``."""
    width = l0 + l1 + l2
    low, high = table + row * width, table + (row + 1) * width
    a0 = tl.load(low + i0, mask=there, other=_FAR)
    a1 = tl.load(low + l0 + i1, mask=there, other=_FAR)
    a2 = tl.load(low + l0 + l1 + i2, mask=there, other=_FAR)
    e0 = tl.load(high + i0, mask=there, other=0)
    e1 = tl.load(high + l0 + i1, mask=there, other=0)
    e2 = tl.load(high + l0 + l1 + i2, mask=there, other=0)
    return a0, a1, a2, e0, e1, e2


@triton.jit
def _inside(k, a, e):
    """[own lanes, other lanes]: whether the other place is in the range of the own one."""
    return (k[None] >= a[:, None]) & (k[None] < e[:, None])


@triton.jit
def _offset(p0, p1, p2, k0, k1, k2, s0, s1, s2, m0, m1, m2):
    """((k - p + m) of each axis) as one index, the axes s wide: bias entries and weight slots."""
    c0 = k0[None] - p0[:, None] + m0
    c1 = k1[None] - p1[:, None] + m1
    return (c0 * s1 + c1) * s2 + k2[None] - p2[:, None] + m2


@triton.jit
def _at(base, i0, i1, i2, st0, st1, st2):
    """Pointers to the rows of a tensor at the positions of the lanes."""
    return base + i0.to(tl.int64) * st0 + i1.to(tl.int64) * st1 + i2.to(tl.int64) * st2


@triton.jit
def _rows(base, i0, i1, i2, st0, st1, st2, there, DIM, D_BLOCK: tl.constexpr):
    """Load the rows of the lanes -> [lanes, D_BLOCK], zeros outside."""
    d = tl.arange(0, D_BLOCK)
    at = _at(base, i0, i1, i2, st0, st1, st2)
    return tl.load(at[:, None] + d[None], mask=there[:, None] & (d < DIM)[None], other=0.0)


@triton.jit
def _save(base, i0, i1, i2, st0, st1, st2, there, x, DIM, D_BLOCK: tl.constexpr):
    d = tl.arange(0, D_BLOCK)
    at = _at(base, i0, i1, i2, st0, st1, st2)
    mask = there[:, None] & (d < DIM)[None]
    tl.store(at[:, None] + d[None], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _query_kernel(
    q, k, v, x, rpb, table, lse, delta, out, out_lse, heads, DIM, DIM_V, DIM_OUT, scale,
    l0, l1, l2, d0, d1, d2, n0, n1, n2, z0, z1, z2,
    qb, q0, q1, q2, qh, kb, k0_, k1_, k2_, kh, vb, v0, v1, v2, vh, xb, x0, x1, x2, xh,
    ob, o0, o1, o2, oh, rb, r0_, r1_, r2_, rh,
    MODE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
):  # fmt: skip
    """Query tiles.

    MODE 0: attention; 1: gradient of q; 2: scores (qk); 3: weighted sum (av); 4: row terms, the
    mean gradient of the probabilities of a row. ``x`` is the gradient of the output in modes 1
    and 4 and the weights in mode 3; ``r`` are the strides of the row terms ``lse`` and ``delta``.
    """
    bh, t0, t1, t2, g0, g1, g2 = _place(tl.program_id(0), n0, n1, n2, d0, d1, d2)
    b, h = bh // heads, bh % heads
    lane = tl.arange(0, T0 * T1 * T2)
    c0, c1, c2 = lane // (T1 * T2), lane // T2 % T1, lane % T2
    p0, p1, p2 = t0 * T0 + c0, t1 * T1 + c1, t2 * T2 + c2
    i0, i1, i2 = g0 + d0 * p0, g1 + d1 * p1, g2 + d2 * p2
    there = (i0 < l0) & (i1 < l1) & (i2 < l2)
    a0, a1, a2, e0, e1, e2 = _range(table, 0, i0, i1, i2, l0, l1, l2, there)
    lo0, lo1, lo2 = tl.min(a0), tl.min(a1), tl.min(a2)
    hi0, hi1, hi2 = tl.max(e0), tl.max(e1), tl.max(e2)
    m0, m1, m2 = tl.cdiv(hi0 - lo0, T0), tl.cdiv(hi1 - lo1, T1), tl.cdiv(hi2 - lo2, T2)
    steps = tl.maximum(m0, 0) * tl.maximum(m1, 0) * tl.maximum(m2, 0)
    q += b * qb + h * qh
    k += b * kb + h * kh
    v += b * vb + h * vh
    x += b * xb + h * xh
    out += b * ob + h * oh
    row_at = _at(lse + b * rb + h * rh, i0, i1, i2, r0_, r1_, r2_)
    if MODE != 3:
        qs = _rows(q, i0, i1, i2, q0, q1, q2, there, DIM, D_BLOCK)
    if MODE == 1 or MODE == 4:
        xs = _rows(x, i0, i1, i2, x0, x1, x2, there, DIM_V, V_BLOCK)
        rows = tl.load(row_at, mask=there, other=0.0)
    if MODE == 1:
        delta_at = _at(delta + b * rb + h * rh, i0, i1, i2, r0_, r1_, r2_)
        deltas = tl.load(delta_at, mask=there, other=0.0)
        acc = tl.zeros([T0 * T1 * T2, D_BLOCK], tl.float32)
    else:
        acc = tl.zeros([T0 * T1 * T2, V_BLOCK], tl.float32)
    top = tl.full([T0 * T1 * T2], 0.0 if MODE == 4 else float("-inf"), tl.float32)
    total = tl.zeros([T0 * T1 * T2], tl.float32)
    for step in range(steps):
        k0 = lo0 + step // (m1 * m2) * T0 + c0
        k1 = lo1 + step // m2 % m1 * T1 + c1
        k2 = lo2 + step % m2 * T2 + c2
        seen = _inside(k0, a0, e0) & _inside(k1, a1, e1) & _inside(k2, a2, e2)
        j0, j1, j2 = g0 + d0 * k0, g1 + d1 * k1, g2 + d2 * k2
        known = (k0 < hi0) & (k1 < hi1) & (k2 < hi2)
        if MODE != 3:
            ks = _rows(k, j0, j1, j2, k0_, k1_, k2_, known, DIM, D_BLOCK)
            s = dot(qs, tl.trans(ks), PRECISION) * scale
            if BIAS:
                bias_at = _offset(
                    p0, p1, p2, k0, k1, k2, 2 * z0 - 1, 2 * z1 - 1, 2 * z2 - 1,
                    z0 - 1, z1 - 1, z2 - 1,
                )  # fmt: skip
                bins = (2 * z0 - 1) * (2 * z1 - 1) * (2 * z2 - 1)
                s += tl.load(rpb + h * bins + bias_at, mask=seen, other=0.0).to(tl.float32)
        if MODE == 0:
            s = tl.where(seen, s, float("-inf"))
            new = tl.maximum(top, tl.max(s, axis=1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp(s - safe[:, None])
            keep = tl.exp(top - safe)
            total = total * keep + tl.sum(p, axis=1)
            vs = _rows(v, j0, j1, j2, v0, v1, v2, known, DIM_V, V_BLOCK)
            acc = acc * keep[:, None] + dot(p.to(vs.dtype), vs, PRECISION)
            top = new
        elif MODE == 1:
            p = tl.where(seen, tl.exp(s - rows[:, None]), 0.0)
            vs = _rows(v, j0, j1, j2, v0, v1, v2, known, DIM_V, V_BLOCK)
            ds = p * (dot(xs, tl.trans(vs), PRECISION) - deltas[:, None])
            acc += dot(ds.to(ks.dtype), ks, PRECISION)
        elif MODE == 4:
            p = tl.where(seen, tl.exp(s - rows[:, None]), 0.0)
            vs = _rows(v, j0, j1, j2, v0, v1, v2, known, DIM_V, V_BLOCK)
            top += tl.sum(p * dot(xs, tl.trans(vs), PRECISION), axis=1)
            total += tl.sum(p, axis=1)
        else:
            slot = _offset(a0, a1, a2, k0, k1, k2, z0, z1, z2, 0, 0, 0)
            if MODE == 2:
                at = _at(out, i0, i1, i2, o0, o1, o2)[:, None] + slot
                tl.store(at, s.to(out.dtype.element_ty), mask=seen)
            else:
                at = _at(x, i0, i1, i2, x0, x1, x2)[:, None] + slot
                vs = _rows(v, j0, j1, j2, v0, v1, v2, known, DIM_V, V_BLOCK)
                w = tl.load(at, mask=seen, other=0.0)
                acc += dot(w.to(vs.dtype), vs, PRECISION)
    if MODE == 0:
        total = tl.where(there, total, 1.0)
        acc = acc / total[:, None]
        row_at = _at(out_lse + b * rb + h * rh, i0, i1, i2, r0_, r1_, r2_)
        tl.store(row_at, top + tl.log(total), mask=there)
    if MODE == 4:
        row_at = _at(out_lse + b * rb + h * rh, i0, i1, i2, r0_, r1_, r2_)
        tl.store(row_at, top / tl.where(there, total, 1.0), mask=there)
    elif MODE == 1:
        _save(out, i0, i1, i2, o0, o1, o2, there, acc * scale, DIM_OUT, D_BLOCK)
    elif MODE != 2:
        _save(out, i0, i1, i2, o0, o1, o2, there, acc, DIM_OUT, V_BLOCK)


@triton.jit
def _key_kernel(
    q, k, v, x, rpb, table, lse, delta, out_k, out_v, heads, DIM, DIM_V, scale,
    l0, l1, l2, d0, d1, d2, n0, n1, n2, z0, z1, z2,
    qb, q0, q1, q2, qh, kb, k0_, k1_, k2_, kh, vb, v0, v1, v2, vh, xb, x0, x1, x2, xh,
    ob, o0, o1, o2, oh, ub, u0, u1, u2, uh, rb, r0_, r1_, r2_, rh,
    MODE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
):  # fmt: skip
    """Key tiles. MODE 0: gradients of k and v; 1: the transposed weighted sum (spread).

    ``x`` is the gradient of the output; in mode 1 ``x`` holds the rows and ``q`` the weights.
    """
    bh, t0, t1, t2, g0, g1, g2 = _place(tl.program_id(0), n0, n1, n2, d0, d1, d2)
    b, h = bh // heads, bh % heads
    lane = tl.arange(0, T0 * T1 * T2)
    c0, c1, c2 = lane // (T1 * T2), lane // T2 % T1, lane % T2
    k0, k1, k2 = t0 * T0 + c0, t1 * T1 + c1, t2 * T2 + c2
    j0, j1, j2 = g0 + d0 * k0, g1 + d1 * k1, g2 + d2 * k2
    known = (j0 < l0) & (j1 < l1) & (j2 < l2)
    a0, a1, a2, e0, e1, e2 = _range(table, 2, j0, j1, j2, l0, l1, l2, known)
    lo0, lo1, lo2 = tl.min(a0), tl.min(a1), tl.min(a2)
    hi0, hi1, hi2 = tl.max(e0), tl.max(e1), tl.max(e2)
    m0, m1, m2 = tl.cdiv(hi0 - lo0, T0), tl.cdiv(hi1 - lo1, T1), tl.cdiv(hi2 - lo2, T2)
    steps = tl.maximum(m0, 0) * tl.maximum(m1, 0) * tl.maximum(m2, 0)
    q += b * qb + h * qh
    k += b * kb + h * kh
    v += b * vb + h * vh
    x += b * xb + h * xh
    if MODE == 0:
        ks = _rows(k, j0, j1, j2, k0_, k1_, k2_, known, DIM, D_BLOCK)
        vs = _rows(v, j0, j1, j2, v0, v1, v2, known, DIM_V, V_BLOCK)
        acc_k = tl.zeros([T0 * T1 * T2, D_BLOCK], tl.float32)
    acc_v = tl.zeros([T0 * T1 * T2, V_BLOCK], tl.float32)
    for step in range(steps):
        p0 = lo0 + step // (m1 * m2) * T0 + c0
        p1 = lo1 + step // m2 % m1 * T1 + c1
        p2 = lo2 + step % m2 * T2 + c2
        seen = _inside(p0, a0, e0) & _inside(p1, a1, e1) & _inside(p2, a2, e2)
        seen = tl.trans(seen)  # [queries, keys]
        i0, i1, i2 = g0 + d0 * p0, g1 + d1 * p1, g2 + d2 * p2
        there = (p0 < hi0) & (p1 < hi1) & (p2 < hi2)
        xs = _rows(x, i0, i1, i2, x0, x1, x2, there, DIM_V, V_BLOCK)
        if MODE == 0:
            qs = _rows(q, i0, i1, i2, q0, q1, q2, there, DIM, D_BLOCK)
            s = dot(qs, tl.trans(ks), PRECISION) * scale
            if BIAS:
                bias_at = _offset(
                    p0, p1, p2, k0, k1, k2, 2 * z0 - 1, 2 * z1 - 1, 2 * z2 - 1,
                    z0 - 1, z1 - 1, z2 - 1,
                )  # fmt: skip
                bins = (2 * z0 - 1) * (2 * z1 - 1) * (2 * z2 - 1)
                s += tl.load(rpb + h * bins + bias_at, mask=seen, other=0.0).to(tl.float32)
            row = b * rb + h * rh
            rows = tl.load(_at(lse + row, i0, i1, i2, r0_, r1_, r2_), mask=there, other=0.0)
            at = _at(delta + row, i0, i1, i2, r0_, r1_, r2_)
            deltas = tl.load(at, mask=there, other=0.0)
            p = tl.where(seen, tl.exp(s - rows[:, None]), 0.0)
            ds = p * (dot(xs, tl.trans(vs), PRECISION) - deltas[:, None])
            acc_k += dot(tl.trans(ds.to(qs.dtype)), qs, PRECISION)
        else:
            w0, w1, w2, _e0, _e1, _e2 = _range(table, 0, i0, i1, i2, l0, l1, l2, there)
            slot = _offset(w0, w1, w2, k0, k1, k2, z0, z1, z2, 0, 0, 0)
            at = _at(q, i0, i1, i2, q0, q1, q2)[:, None] + slot
            p = tl.load(at, mask=seen, other=0.0)
        acc_v += dot(tl.trans(p.to(xs.dtype)), xs, PRECISION)
    if MODE == 0:
        base = out_k + b * ob + h * oh
        _save(base, j0, j1, j2, o0, o1, o2, known, acc_k * scale, DIM, D_BLOCK)
    _save(out_v + b * ub + h * uh, j0, j1, j2, u0, u1, u2, known, acc_v, DIM_V, V_BLOCK)


# --- host -----------------------------------------------------------------------------------------


def _three(layout: Layout) -> Layout:
    """The axes, with axes of one token before them until there are three."""
    return (*(Axis(1, 1, 1, 1, False),) * (3 - len(layout)), *layout)


@lru_cache(maxsize=64)
def _table(layout: Layout, device: torch.device) -> Tensor:
    """int32 [4, sum of lengths]: (st, en) of queries, then (first, end) query of keys, in places.

    Both ends of a window only grow with the place of the query, so the queries that see a key
    follow each other.
    """
    columns: list[tuple[int, int, int, int]] = []
    for axis in _three(layout):
        rows = [(0, 0, 0, 0)] * axis.length
        for group, groups, count in axis.groups():
            windows = [axis.window(place, count) for place in range(count)]
            first = last = 0
            for key, (start, end) in enumerate(windows):
                while windows[first][1] <= key:
                    first += 1
                while last < count and windows[last][0] <= key:
                    last += 1
                for g in range(group, group + groups):
                    rows[g + key * axis.dilation] = (start, end, first, last)
        columns += rows
    return torch.tensor(columns, dtype=torch.int32).t().contiguous().to(device)


def _strides(t: Tensor) -> tuple[int, ...]:
    """Of [B, *space, H, x] as (B, three axes, H); the last must be 1."""
    inner = t.stride()[1:-2]
    return (t.stride(0), *(0,) * (3 - len(inner)), *inner, t.stride(-2))


def _dense(*tensors: Tensor) -> list[Tensor]:
    return [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in tensors]


def _grid(layout: Layout, tile: tuple[int, ...]) -> tuple[list[int], int]:
    """Lengths, dilations, tiles and kernels of three axes; programs of one head and image."""
    axes = _three(layout)
    places = [triton.cdiv(a.length, a.dilation) for a in axes]
    counts = [triton.cdiv(n, t) for n, t in zip(places, tile, strict=True)]
    dilations = [a.dilation for a in axes]
    numbers = [*(a.length for a in axes), *dilations, *counts, *(a.kernel for a in axes)]
    return numbers, product(counts) * product(dilations)


def tuned(rows: str, width: int, products: str) -> tuple[int, int, int]:
    """(lanes, warps, stages) of the kernel over ``rows`` (``"queries"`` or ``"keys"``).

    ``width``: of the head dims the larger, a power of 2; ``products``: their precision. Half types
    by measurement on an H100 (56 and 64 tokens a side, kernels 7 and 13); fp32 without tensor
    cores holds whole operands in registers and wants them spread over more threads.
    """
    if products == "ieee":
        return 32, 8, 2
    if rows == "queries" and width == 64:
        return 64, 4, 1
    return 32, 2, 1 if width <= 32 or rows == "keys" else 2


def _switches(
    rows: str, mode: int, q: Tensor, v: Tensor, rpb: Tensor | None, rank: int
) -> tuple[tuple[int, ...], dict[str, int | bool | str]]:
    """The tile, and what a kernel is compiled for."""
    dims = [max(16, triton.next_power_of_2(t.shape[-1])) for t in (q, v)]
    products = precision(q.dtype)
    lanes, warps, stages = tuned(rows, max(dims), products)
    tile = TILES[lanes][rank]
    return tile, {
        "MODE": mode,
        "BIAS": rpb is not None,
        "PRECISION": products,
        "D_BLOCK": dims[0],
        "V_BLOCK": dims[1],
        **dict(zip(("T0", "T1", "T2"), tile, strict=True)),
        "num_warps": warps,
        "num_stages": stages,
    }


def _run_queries(
    mode: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rpb: Tensor | None, lse: Tensor,
    delta: Tensor, out: Tensor, layout: Layout, scale: float,
) -> None:  # fmt: skip
    """Launch ``_query_kernel``; tensors that a mode does not read are given for their pointer.

    Modes 0 and 4 write ``delta``: the LSE, the row terms.
    """
    if out.numel() == 0:
        return
    tile, switches = _switches("queries", mode, q, v, rpb, len(layout))
    q, k, v, x = _dense(q, k, v, x)
    numbers, programs = _grid(layout, tile)
    strides = [s for t in (q, k, v, x, out, lse[..., None]) for s in _strides(t)]
    bias = q if rpb is None else rpb.contiguous()
    table = _table(layout, q.device)
    launch(
        _query_kernel, (programs * len(q) * q.shape[-2],),
        q, k, v, x, bias, table, lse, delta, out, delta, q.shape[-2], q.shape[-1], v.shape[-1],
        out.shape[-1], scale, *numbers, *strides, **switches,
    )  # fmt: skip


def _run_keys(
    mode: int, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rpb: Tensor | None, lse: Tensor,
    delta: Tensor, out_k: Tensor, out_v: Tensor, layout: Layout, scale: float,
) -> None:  # fmt: skip
    if out_v.numel() == 0:
        return
    tile, switches = _switches("keys", mode, k, v, rpb, len(layout))
    q, k, v, x = _dense(q, k, v, x)
    numbers, programs = _grid(layout, tile)
    strides = [s for t in (q, k, v, x, out_k, out_v, lse[..., None]) for s in _strides(t)]
    bias = q if rpb is None else rpb.contiguous()
    table = _table(layout, q.device)
    launch(
        _key_kernel, (programs * len(k) * k.shape[-2],),
        q, k, v, x, bias, table, lse, delta, out_k, out_v, k.shape[-2], k.shape[-1], v.shape[-1],
        scale, *numbers, *strides, **switches,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, layout: Layout, scale: float,
    out_dtype: torch.dtype, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, *space, H, Dv] in ``out_dtype`` and LSE [B, *space, H] in fp32, always."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _run_queries(0, q, k, v, q, rpb, lse, lse, out, layout, scale)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    rpb: Tensor | None, out: Tensor, lse: Tensor, layout: Layout, scale: float, rpb_grad: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the bias, from the stored LSE.

    fp32 pays one more pass for the row terms: taken from the rounded output, as half types have
    them, they leave a gradient of 1e-6 where a causal row has one key and the true one is zero.
    """
    lse = lse.contiguous()
    delta = torch_impl.row_terms(grad_out, grad_lse, out).contiguous()
    if q.dtype == torch.float32 and not shared:
        _run_queries(4, q, k, v, grad_out, rpb, lse, delta, out, layout, scale)
        delta = delta if grad_lse is None else delta - grad_lse
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=_DENSE) for t in (q, k, v))
    _run_queries(1, q, k, v, grad_out, rpb, lse, delta, grad_q, layout, scale)
    _run_keys(0, q, k, v, grad_out, rpb, lse, delta, grad_k, grad_v, layout, scale)
    if rpb is None or not rpb_grad:
        return grad_q, grad_k, grad_v, None
    # The K scores of each query again, written out: N * K numbers, summed offset by offset.
    ds = torch.exp(qk(q, k, rpb, layout, scale, lse.dtype) - lse[..., None])
    ds *= qk(grad_out, v, None, layout, 1.0, lse.dtype).nan_to_num(neginf=0.0) - delta[..., None]
    return grad_q, grad_k, grad_v, torch_impl.bias_grad(ds, layout)


def qk(
    q: Tensor, k: Tensor, rpb: Tensor | None, layout: Layout, scale: float,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Scores of each query with its K neighbours -> [B, *space, H, K]; -inf where none is."""
    shape = (*q.shape[:-1], product(a.kernel for a in layout))
    out = torch.full(shape, -torch.inf, dtype=dtype or q.dtype, device=q.device)
    _run_queries(2, q, k, k, q, rpb, out[..., 0], out[..., 0], out, layout, scale)
    return out


def av(attn: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Weights [B, *space, H, K] times the values of the neighbours -> [B, *space, H, Dv]."""
    out = torch.empty((*attn.shape[:-1], v.shape[-1]), dtype=v.dtype, device=v.device)
    _run_queries(3, v, v, v, attn, None, out[..., 0], out[..., 0], out, layout, 1.0)
    return out


def spread(attn: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The transpose of :func:`av`: each row of ``x`` goes, weighted, to its neighbours."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run_keys(1, attn, x, x, x, None, out[..., 0], out[..., 0], out, out, layout, 1.0)
    return out
