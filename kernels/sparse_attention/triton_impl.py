# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path of sparse attention and of the low-rank top-k.

By index: one program per query gathers the rows of its keys; the gradients of keys and values
are summed per key over the transposed lists (one sort). By block mask: tiles of queries against
the tiles of the blocks they see, online softmax; the backward runs over the same mask by rows,
then by columns. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import dot, launch, precision, warps

TILE = 32  # keys of one query at a time
SIDE = 64  # largest tile of a block, in queries and in keys


@triton.jit
def _gathered(t, base, row_stride, index, seen, d, DIM):
    """Rows ``index`` of one head as fp32 [tile, D_BLOCK]; zeros where not ``seen``."""
    at = t + base + index.to(tl.int64)[:, None] * row_stride + d[None]
    return tl.load(at, mask=seen[:, None] & (d < DIM)[None], other=0.0).to(tl.float32)


@triton.jit
def _index_kernel(
    q, k, v, idx, out, norm, heads, QUERIES, WIDTH, DIM, DIM_V, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2,
    TILE: tl.constexpr, D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """One query over its keys, online softmax; zeros if it has none."""
    i, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, V_BLOCK)
    row = bh * QUERIES + i
    qs = tl.load(q + b * q0 + h * q1 + i * q2 + d, mask=d < DIM, other=0.0).to(tl.float32)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([V_BLOCK], tl.float32)
    for start in range(0, WIDTH, TILE):
        e = start + tl.arange(0, TILE)
        index = tl.load(idx + row * WIDTH + e, mask=e < WIDTH, other=-1)
        seen = index >= 0
        ks = _gathered(k, b * k0 + h * k1, k2, index, seen, d, DIM)
        vs = _gathered(v, b * v0 + h * v1, v2, index, seen, dv, DIM_V)
        s = tl.where(seen, tl.sum(ks * qs[None], axis=1) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - safe)
        shrink = tl.exp(top - safe)
        total = total * shrink + tl.sum(p, axis=0)
        acc = acc * shrink + tl.sum(p[:, None] * vs, axis=0)
        top = new
    total = tl.where(total > 0, total, 1.0)
    tl.store(out + row * DIM_V + dv, (acc / total).to(out.dtype.element_ty), mask=dv < DIM_V)
    one = tl.arange(0, 1)
    tl.store(norm + 2 * row + one, tl.where(top == float("-inf"), 0.0, top))
    tl.store(norm + 2 * row + 1 + one, total)


@triton.jit
def _index_pairs(
    qs, gs, k, v, idx, e, row, WIDTH, k_base, v_base, k2, v2, d, dv, DIM, DIM_V, top, total,
    scale,
):  # fmt: skip
    """(keys, probabilities, their gradient) of a tile of one query's list."""
    index = tl.load(idx + row * WIDTH + e, mask=e < WIDTH, other=-1)
    seen = index >= 0
    ks = _gathered(k, k_base, k2, index, seen, d, DIM)
    vs = _gathered(v, v_base, v2, index, seen, dv, DIM_V)
    s = tl.sum(ks * qs[None], axis=1) * scale
    p = tl.where(seen, tl.exp(s - top) / total, 0.0)
    return ks, p, tl.sum(vs * gs[None], axis=1)


@triton.jit
def _index_query_grad_kernel(
    q, k, v, idx, grad, norm, grad_q, p_out, s_out, heads, QUERIES, WIDTH, DIM, DIM_V, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2,
    TILE: tl.constexpr, D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of one query; leaves the probabilities and the gradients of its scores."""
    i, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, V_BLOCK)
    row = bh * QUERIES + i
    qs = tl.load(q + b * q0 + h * q1 + i * q2 + d, mask=d < DIM, other=0.0).to(tl.float32)
    gs = tl.load(grad + b * g0 + h * g1 + i * g2 + dv, mask=dv < DIM_V, other=0.0)
    gs = gs.to(tl.float32)
    top, total = tl.load(norm + 2 * row), tl.load(norm + 2 * row + 1)
    k_base, v_base = b * k0 + h * k1, b * v0 + h * v1
    drop = tl.zeros([1], tl.float32)
    for start in range(0, WIDTH, TILE):
        _ks, p, gp = _index_pairs(
            qs, gs, k, v, idx, start + tl.arange(0, TILE), row, WIDTH, k_base, v_base, k2, v2,
            d, dv, DIM, DIM_V, top, total, scale,
        )  # fmt: skip
        drop += tl.sum(p * gp, axis=0)
    acc = tl.zeros([D_BLOCK], tl.float32)
    for start in range(0, WIDTH, TILE):
        e = start + tl.arange(0, TILE)
        ks, p, gp = _index_pairs(
            qs, gs, k, v, idx, e, row, WIDTH, k_base, v_base, k2, v2,
            d, dv, DIM, DIM_V, top, total, scale,
        )  # fmt: skip
        ds = p * (gp - drop) * scale
        acc += tl.sum(ds[:, None] * ks, axis=0)
        tl.store(p_out + row * WIDTH + e, p, mask=e < WIDTH)
        tl.store(s_out + row * WIDTH + e, ds, mask=e < WIDTH)
    tl.store(grad_q + row * DIM + d, acc.to(grad_q.dtype.element_ty), mask=d < DIM)


@triton.jit
def _index_key_grad_kernel(
    q, grad, order, starts, p_in, s_in, grad_k, grad_v, heads, QUERIES, KEYS_N, WIDTH, DIM,
    DIM_V, q0, q1, q2, g0, g1, g2,
    TILE: tl.constexpr, D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one key and value: over the queries that see it."""
    j, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, V_BLOCK)
    row = bh * KEYS_N + j
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    acc_k = tl.zeros([D_BLOCK], tl.float32)
    acc_v = tl.zeros([V_BLOCK], tl.float32)
    for start in range(first, last, TILE):
        at = start + tl.arange(0, TILE)
        seen = at < last
        e = tl.load(order + at, mask=seen, other=0)
        query = e // WIDTH - bh * QUERIES
        p = tl.load(p_in + e, mask=seen, other=0.0)
        ds = tl.load(s_in + e, mask=seen, other=0.0)
        qs = _gathered(q, b * q0 + h * q1, q2, query, seen, d, DIM)
        gs = _gathered(grad, b * g0 + h * g1, g2, query, seen, dv, DIM_V)
        acc_k += tl.sum(ds[:, None] * qs, axis=0)
        acc_v += tl.sum(p[:, None] * gs, axis=0)
    tl.store(grad_k + row * DIM + d, acc_k.to(grad_k.dtype.element_ty), mask=d < DIM)
    tl.store(grad_v + row * DIM_V + dv, acc_v.to(grad_v.dtype.element_ty), mask=dv < DIM_V)


@triton.jit
def _tile_rows(t, base, stride, r, inside, d, DIM):
    at = t + base + r[:, None].to(tl.int64) * stride + d[None]
    return tl.load(at, mask=inside[:, None] & (d < DIM)[None], other=0.0)


@triton.jit
def _put_tile(t, value, base, stride, r, inside, d, DIM):
    at = t + base + r[:, None].to(tl.int64) * stride + d[None]
    tl.store(at, value.to(t.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None])


@triton.jit
def _part(block, part, SIZE, COUNT, TILE: tl.constexpr):
    """Rows of one tile of a block, and which of them exist."""
    within = part * TILE + tl.arange(0, TILE)
    r = block * SIZE + within
    return r, (within < SIZE) & (r < COUNT)


@triton.jit
def _tile_softmax(qs, ks, top, total, seen, scale, PRECISION: tl.constexpr):
    s = dot(qs, tl.trans(ks), PRECISION) * scale
    return tl.where(seen[None], tl.exp(s - top[:, None]) / total[:, None], 0.0)


@triton.jit
def _block_kernel(
    q, k, v, blocks, out, norm, heads, QUERIES, KEYS_N, DIM, DIM_V, scale, DOWN, ACROSS,
    SIZE_Q, SIZE_K, PARTS_Q, PARTS_K, m0, m1, q0, q1, q2, k0, k1, k2, v0, v1, v2,
    ROWS: tl.constexpr, COLS: tl.constexpr, D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries over the blocks that its row of the mask holds."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    block = tl.program_id(0) // PARTS_Q
    r, inside = _part(block, tl.program_id(0) % PARTS_Q, SIZE_Q, QUERIES, ROWS)
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, V_BLOCK)
    qs = _tile_rows(q, b * q0 + h * q1, q2, r, inside, d, DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    for j in range(0, ACROSS):
        if tl.load(blocks + b * m0 + h * m1 + block * ACROSS + j) != 0:
            for part in range(0, PARTS_K):
                n, seen = _part(j, part, SIZE_K, KEYS_N, COLS)
                ks = _tile_rows(k, b * k0 + h * k1, k2, n, seen, d, DIM)
                vs = _tile_rows(v, b * v0 + h * v1, v2, n, seen, dv, DIM_V)
                s = tl.where(seen[None], dot(qs, tl.trans(ks), PRECISION) * scale, float("-inf"))
                new = tl.maximum(top, tl.max(s, axis=1))
                safe = tl.where(new == float("-inf"), 0.0, new)
                p = tl.exp(s - safe[:, None])
                shrink = tl.exp(top - safe)
                total = total * shrink + tl.sum(p, axis=1)
                acc = acc * shrink[:, None] + dot(p.to(vs.dtype), vs, PRECISION)
                top = new
    total = tl.where(total > 0, total, 1.0)
    _put_tile(out, acc / total[:, None], bh * QUERIES * DIM_V, DIM_V, r, inside, dv, DIM_V)
    tl.store(norm + 2 * (bh * QUERIES + r), tl.where(top == float("-inf"), 0.0, top), mask=inside)
    tl.store(norm + 2 * (bh * QUERIES + r) + 1, total, mask=inside)


@triton.jit
def _block_query_grad_kernel(
    q, k, v, blocks, grad, norm, delta, grad_q, heads, QUERIES, KEYS_N, DIM, DIM_V, scale, DOWN,
    ACROSS, SIZE_Q, SIZE_K, PARTS_Q, PARTS_K, m0, m1, q0, q1, q2, k0, k1, k2, v0, v1, v2,
    g0, g1, g2,
    ROWS: tl.constexpr, COLS: tl.constexpr, D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; leaves ``delta`` (sum of p times its gradient)."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    block = tl.program_id(0) // PARTS_Q
    r, inside = _part(block, tl.program_id(0) % PARTS_Q, SIZE_Q, QUERIES, ROWS)
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, V_BLOCK)
    qs = _tile_rows(q, b * q0 + h * q1, q2, r, inside, d, DIM)
    gs = _tile_rows(grad, b * g0 + h * g1, g2, r, inside, dv, DIM_V)
    top = tl.load(norm + 2 * (bh * QUERIES + r), mask=inside, other=0.0)
    total = tl.load(norm + 2 * (bh * QUERIES + r) + 1, mask=inside, other=1.0)
    drop = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_BLOCK], tl.float32)
    for pas in range(0, 2):  # the sum first, then what needs it
        for j in range(0, ACROSS):
            if tl.load(blocks + b * m0 + h * m1 + block * ACROSS + j) != 0:
                for part in range(0, PARTS_K):
                    n, seen = _part(j, part, SIZE_K, KEYS_N, COLS)
                    ks = _tile_rows(k, b * k0 + h * k1, k2, n, seen, d, DIM)
                    vs = _tile_rows(v, b * v0 + h * v1, v2, n, seen, dv, DIM_V)
                    p = _tile_softmax(qs, ks, top, total, seen, scale, PRECISION)
                    gp = dot(gs, tl.trans(vs), PRECISION)
                    if pas == 0:
                        drop += tl.sum(p * gp, axis=1)
                    else:
                        ds = p * (gp - drop[:, None]) * scale
                        acc += dot(ds.to(ks.dtype), ks, PRECISION)
    tl.store(delta + bh * QUERIES + r, drop, mask=inside)
    _put_tile(grad_q, acc, bh * QUERIES * DIM, DIM, r, inside, d, DIM)


@triton.jit
def _block_key_grad_kernel(
    q, k, v, blocks, grad, norm, delta, grad_k, grad_v, heads, QUERIES, KEYS_N, DIM, DIM_V,
    scale, DOWN, ACROSS, SIZE_Q, SIZE_K, PARTS_Q, PARTS_K, m0, m1,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2,
    ROWS: tl.constexpr, COLS: tl.constexpr, D_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over the blocks of queries that see it."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    block = tl.program_id(0) // PARTS_K
    n, seen = _part(block, tl.program_id(0) % PARTS_K, SIZE_K, KEYS_N, COLS)
    d, dv = tl.arange(0, D_BLOCK), tl.arange(0, V_BLOCK)
    ks = _tile_rows(k, b * k0 + h * k1, k2, n, seen, d, DIM)
    vs = _tile_rows(v, b * v0 + h * v1, v2, n, seen, dv, DIM_V)
    acc_k = tl.zeros([COLS, D_BLOCK], tl.float32)
    acc_v = tl.zeros([COLS, V_BLOCK], tl.float32)
    for i in range(0, DOWN):
        if tl.load(blocks + b * m0 + h * m1 + i * ACROSS + block) != 0:
            for part in range(0, PARTS_Q):
                r, inside = _part(i, part, SIZE_Q, QUERIES, ROWS)
                qs = _tile_rows(q, b * q0 + h * q1, q2, r, inside, d, DIM)
                gs = _tile_rows(grad, b * g0 + h * g1, g2, r, inside, dv, DIM_V)
                top = tl.load(norm + 2 * (bh * QUERIES + r), mask=inside, other=0.0)
                total = tl.load(norm + 2 * (bh * QUERIES + r) + 1, mask=inside, other=1.0)
                drop = tl.load(delta + bh * QUERIES + r, mask=inside, other=0.0)
                # Rows outside have q = g = 0, so they add nothing.
                p = _tile_softmax(qs, ks, top, total, seen, scale, PRECISION)
                ds = p * (dot(gs, tl.trans(vs), PRECISION) - drop[:, None]) * scale
                acc_v += dot(tl.trans(p).to(gs.dtype), gs, PRECISION)
                acc_k += dot(tl.trans(ds).to(qs.dtype), qs, PRECISION)
    _put_tile(grad_k, acc_k, bh * KEYS_N * DIM, DIM, n, seen, d, DIM)
    _put_tile(grad_v, acc_v, bh * KEYS_N * DIM_V, DIM_V, n, seen, dv, DIM_V)


@triton.jit
def _topk_kernel(
    coef, basis, mask, out, heads, ROWS_N, COLS, RANK, KEEP, threshold,
    b0, b1, b2,
    LIMIT: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its scores in registers, the KEEP-th largest by bisection of their bits."""
    i, bh = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    n = tl.arange(0, BLOCK)
    inside = n < COLS
    row = bh * ROWS_N + i
    s = tl.zeros([BLOCK], tl.float32)
    for r in range(0, RANK):
        c = tl.load(coef + row * RANK + r).to(tl.float32)
        at = basis + b * b0 + h * b1 + r * b2 + n
        s += c * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if LIMIT:
        inside = inside & (s > threshold)
    if MASK:
        inside = inside & (tl.load(mask + b * COLS + n, mask=n < COLS, other=0) != 0)
    # Bits of a float in the order of its value; adding zero turns -0 into 0, which it ties with.
    bits = (s + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(inside, key, -(1 << 40))
    keep = tl.minimum(tl.sum(inside.to(tl.int32), axis=0), KEEP)
    low = -(1 << 31) + row * 0
    high = (1 << 31) - 1 + row * 0
    for _ in range(0, 32):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= keep
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    equal = (key == low).to(tl.int32)
    above = (key > low).to(tl.int32)
    spare = keep - tl.sum(above, axis=0)
    chosen = (above + tl.where((equal > 0) & (tl.cumsum(equal, 0) <= spare), 1, 0)) > 0
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out + row * KEEP + place, n.to(tl.int64), mask=chosen)


def _rowwise(t: Tensor) -> Tensor:
    """The last dimension next to one another in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [n for t in tensors for n in t.stride()[:3]]


def _widths(k: Tensor, v: Tensor) -> dict[str, int]:
    return {
        "D_BLOCK": max(16, triton.next_power_of_2(k.shape[3])),
        "V_BLOCK": max(16, triton.next_power_of_2(v.shape[3])),
    }


def _empty_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype, device=v.device)
    return out, torch.zeros(*q.shape[:3], 2, device=q.device)


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, N, dv]; largest score and sum of exponentials of every row [B, H, N, 2]."""
    out, norm = _empty_forward(q, v)
    if 0 in (*idx.shape, k.shape[2]):
        return out, norm
    q, k, v, idx = (_rowwise(q), _rowwise(k), _rowwise(v), idx.contiguous())
    b, h, n, dim = q.shape
    launch(
        _index_kernel, (n, b * h),
        q, k, v, idx, out, norm, h, n, idx.shape[3], dim, v.shape[3], scale,
        *_strides(q, k, v), TILE=TILE, **_widths(k, v),
    )  # fmt: skip
    return out, norm


def _transposed(idx: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Entries in the order of their keys, and where each key starts (one more at the end)."""
    groups = idx.shape[0] * idx.shape[1]
    start = torch.arange(groups, device=idx.device).view(*idx.shape[:2], 1, 1) * keys
    flat = torch.where(idx < 0, groups * keys, idx + start).flatten()
    ranked, order = flat.sort(stable=True)
    edges = torch.arange(groups * keys + 1, device=idx.device)
    return order, torch.searchsorted(ranked, edges)


def sparse_backward(
    grad: Tensor, out: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    if 0 in (*idx.shape, k.shape[2]):
        return grads[0], grads[1], grads[2]
    grad, q, k, v = (_rowwise(t) for t in (grad, q, k, v))
    idx = idx.contiguous()
    b, h, n, dim = q.shape
    keys, width, dim_v = k.shape[2], idx.shape[3], v.shape[3]
    p = torch.empty(idx.shape, device=q.device)
    ds = torch.empty_like(p)
    tile = {"TILE": TILE, **_widths(k, v)}
    launch(
        _index_query_grad_kernel, (n, b * h),
        q, k, v, idx, grad, norm, grads[0], p, ds, h, n, width, dim, dim_v, scale,
        *_strides(q, k, v, grad), **tile,
    )  # fmt: skip
    order, starts = _transposed(idx, keys)
    launch(
        _index_key_grad_kernel, (keys, b * h),
        q, grad, order, starts, p, ds, grads[1], grads[2], h, n, keys, width, dim, dim_v,
        *_strides(q, grad), **tile,
    )  # fmt: skip
    return grads[0], grads[1], grads[2]


def _block_numbers(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, list[int | float], dict[str, Any], tuple[int, int]]:
    """(mask, numbers, switches, tiles of queries and keys) that the block kernels share."""
    _, h, n, dim = q.shape
    rows, cols = (min(SIDE, max(16, triton.next_power_of_2(s))) for s in (block_q, block_k))
    parts = triton.cdiv(block_q, rows), triton.cdiv(block_k, cols)
    down, across = blocks.shape[2:]
    mask = blocks.to(torch.int8).contiguous()
    m0 = mask.stride(0) if mask.shape[0] > 1 else 0
    m1 = mask.stride(1) if mask.shape[1] > 1 else 0
    numbers = [
        h, n, k.shape[2], dim, v.shape[3], scale, down, across, block_q, block_k, *parts, m0, m1
    ]  # fmt: skip
    products = precision(q.dtype)
    switches = {"ROWS": rows, "COLS": cols, "PRECISION": products, "num_warps": warps(products)}
    switches |= _widths(k, v)
    return mask, numbers, switches, (down * parts[0], across * parts[1])


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, N, dv]; largest score and sum of exponentials of every row [B, H, N, 2]."""
    out, norm = _empty_forward(q, v)
    if 0 in (*q.shape[:3], k.shape[2]):
        return out, norm
    q, k, v = (_rowwise(t) for t in (q, k, v))
    mask, numbers, switches, tiles = _block_numbers(q, k, v, blocks, block_q, block_k, scale)
    launch(
        _block_kernel, (tiles[0], q.shape[0] * q.shape[1]),
        q, k, v, mask, out, norm, *numbers, *_strides(q, k, v), **switches,
    )  # fmt: skip
    return out, norm


def block_backward(
    grad: Tensor, out: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor,
    block_q: int, block_k: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    grads = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    if 0 in (*q.shape[:3], k.shape[2]):
        return grads[0], grads[1], grads[2]
    grad, q, k, v = (_rowwise(t) for t in (grad, q, k, v))
    mask, numbers, switches, tiles = _block_numbers(q, k, v, blocks, block_q, block_k, scale)
    delta = torch.empty(q.shape[:3], device=q.device)
    heads = q.shape[0] * q.shape[1]
    shared = (q, k, v, mask, grad, norm, delta)
    numbers += _strides(q, k, v, grad)
    launch(_block_query_grad_kernel, (tiles[0], heads), *shared, grads[0], *numbers, **switches)
    launch(_block_key_grad_kernel, (tiles[1], heads), *shared, *grads[1:], *numbers, **switches)
    return grads[0], grads[1], grads[2]


def lowrank_topk(
    coef: Tensor, basis: Tensor, num_keep: int, threshold: float | None, mask: Tensor | None
) -> Tensor:
    """int64 [B, H, R, num_keep], rising, -1 after the last."""
    b, h, rows, rank = coef.shape
    n = basis.shape[3]
    out = torch.full((b, h, rows, num_keep), -1, dtype=torch.long, device=coef.device)
    if 0 in (*out.shape, n):
        return out
    basis = _rowwise(basis)
    strides = [basis.stride(i) if basis.shape[i] > 1 else 0 for i in (0, 1)]
    launch(
        _topk_kernel, (rows, b * h),
        coef.contiguous(), basis, out if mask is None else mask.to(torch.int8).contiguous(), out,
        h, rows, n, rank, num_keep, 0.0 if threshold is None else threshold,
        *strides, basis.stride(2),
        LIMIT=threshold is not None, MASK=mask is not None, BLOCK=triton.next_power_of_2(n),
    )  # fmt: skip
    return out
