# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path of HiLo attention.

High branch: one program takes several windows of one head as one tile of 32 to 64 tokens, with a
block-diagonal mask: the wasted products are cheaper than tensors of 4 x 4, and nothing is
permuted in memory. Low branch: an online softmax over the pooled keys. The backward recomputes
the probabilities; each gradient is summed by one program, no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import dot, launch, precision, warps

from .torch_impl import grid, hidden, padded

SIDE = 64  # of a tile of the low branch


@triton.jit
def _window_tokens(height, width, rows, cols, windows, WS: tl.constexpr, TILE: tl.constexpr):
    """(image, y, x, window in the tile, inside the image) of the tile's tokens."""
    TOKENS: tl.constexpr = WS * WS
    r = tl.arange(0, TILE)
    slot = r // TOKENS
    window = tl.program_id(0).to(tl.int64) * (TILE // TOKENS) + slot
    token = r % TOKENS
    b = window // (rows * cols)
    at = window % (rows * cols)
    y = at // cols * WS + token // WS
    x = at % cols * WS + token % WS
    inside = (slot < TILE // TOKENS) & (window < windows) & (y < height) & (x < width)
    return b, y, x, slot, inside


@triton.jit
def _load(t, b, y, x, h, d, s0, s1, s2, s3, inside, DIM):
    at = t + (b * s0 + y * s1 + x * s2 + h * s3)[:, None] + d[None]
    return tl.load(at, mask=inside[:, None] & (d < DIM)[None], other=0.0)


@triton.jit
def _store(t, value, b, y, x, h, d, s0, s1, s2, s3, inside, DIM):
    at = t + (b * s0 + y * s1 + x * s2 + h * s3)[:, None] + d[None]
    tl.store(at, value.to(t.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None])


@triton.jit
def _window_softmax(q, k, slot, inside, scale, PRECISION: tl.constexpr):
    """Probabilities [tile, tile]; a row without keys (outside) is zero."""
    s = dot(q, tl.trans(k), PRECISION) * scale
    seen = (slot[:, None] == slot[None]) & inside[None]
    s = tl.where(seen, s, float("-inf"))
    top = tl.max(s, axis=1)
    e = tl.exp(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(e, axis=1)
    return e / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def _high_kernel(
    q, k, v, out, height, width, rows, cols, windows, DIM, scale,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, o0, o1, o2, o3,
    WS: tl.constexpr, TILE: tl.constexpr, D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention inside the windows of one tile, one head."""
    b, y, x, slot, inside = _window_tokens(height, width, rows, cols, windows, WS, TILE)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    qs = _load(q, b, y, x, h, d, q0, q1, q2, q3, inside, DIM)
    ks = _load(k, b, y, x, h, d, k0, k1, k2, k3, inside, DIM)
    vs = _load(v, b, y, x, h, d, v0, v1, v2, v3, inside, DIM)
    p = _window_softmax(qs, ks, slot, inside, scale, PRECISION)
    o = dot(p.to(vs.dtype), vs, PRECISION)
    _store(out, o, b, y, x, h, d, o0, o1, o2, o3, inside, DIM)


@triton.jit
def _high_backward_kernel(
    q, k, v, grad, grad_q, grad_k, grad_v, height, width, rows, cols, windows, DIM, scale,
    q0, q1, q2, q3, k0, k1, k2, k3, v0, v1, v2, v3, g0, g1, g2, g3, o0, o1, o2, o3,
    WS: tl.constexpr, TILE: tl.constexpr, D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the windows of one tile, one head."""
    b, y, x, slot, inside = _window_tokens(height, width, rows, cols, windows, WS, TILE)
    h = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, D_BLOCK)
    qs = _load(q, b, y, x, h, d, q0, q1, q2, q3, inside, DIM)
    ks = _load(k, b, y, x, h, d, k0, k1, k2, k3, inside, DIM)
    vs = _load(v, b, y, x, h, d, v0, v1, v2, v3, inside, DIM)
    gs = _load(grad, b, y, x, h, d, g0, g1, g2, g3, inside, DIM)
    p = _window_softmax(qs, ks, slot, inside, scale, PRECISION)
    gp = dot(gs, tl.trans(vs), PRECISION)
    ds = p * (gp - tl.sum(p * gp, axis=1)[:, None]) * scale
    dv = dot(tl.trans(p).to(gs.dtype), gs, PRECISION)
    dq = dot(ds.to(ks.dtype), ks, PRECISION)
    dk = dot(tl.trans(ds).to(qs.dtype), qs, PRECISION)
    _store(grad_q, dq, b, y, x, h, d, o0, o1, o2, o3, inside, DIM)
    _store(grad_k, dk, b, y, x, h, d, o0, o1, o2, o3, inside, DIM)
    _store(grad_v, dv, b, y, x, h, d, o0, o1, o2, o3, inside, DIM)


@triton.jit
def _rows_of(t, b, h, r, d, s0, s1, s2, COUNT, DIM):
    """Rows ``r`` of one head [rows, D_BLOCK]; zeros outside."""
    at = t + b * s0 + h * s2 + r[:, None].to(tl.int64) * s1 + d[None]
    return tl.load(at, mask=(r < COUNT)[:, None] & (d < DIM)[None], other=0.0)


@triton.jit
def _put_rows(t, value, b, h, r, d, s0, s1, s2, COUNT, DIM):
    at = t + b * s0 + h * s2 + r[:, None].to(tl.int64) * s1 + d[None]
    tl.store(at, value.to(t.dtype.element_ty), mask=(r < COUNT)[:, None] & (d < DIM)[None])


@triton.jit
def _low_kernel(
    q, k, v, out, norm, heads, QUERIES, KEYS_N, DIM, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, o0, o1, o2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of queries against all pooled keys of one head, online softmax."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_BLOCK)
    qs = _rows_of(q, b, h, r, d, q0, q1, q2, QUERIES, DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_BLOCK], tl.float32)
    for start in range(0, KEYS_N, KEYS):
        n = start + tl.arange(0, KEYS)
        ks = _rows_of(k, b, h, n, d, k0, k1, k2, KEYS_N, DIM)
        vs = _rows_of(v, b, h, n, d, v0, v1, v2, KEYS_N, DIM)
        s = tl.where((n < KEYS_N)[None], dot(qs, tl.trans(ks), PRECISION) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp(s - new[:, None])
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + dot(p.to(vs.dtype), vs, PRECISION)
        top = new
    _put_rows(out, acc / total[:, None], b, h, r, d, o0, o1, o2, QUERIES, DIM)
    # Largest score and sum apart: their log-sum-exp would round away digits of both.
    tl.store(norm + 2 * (bh * QUERIES + r), top, mask=r < QUERIES)
    tl.store(norm + 2 * (bh * QUERIES + r) + 1, total, mask=r < QUERIES)


@triton.jit
def _low_tile(qs, ks, vs, gs, top, total, n, KEYS_N, scale, PRECISION: tl.constexpr):
    """(probabilities, their gradient) of one tile [rows, keys]."""
    s = dot(qs, tl.trans(ks), PRECISION) * scale
    p = tl.where((n < KEYS_N)[None], tl.exp(s - top[:, None]) / total[:, None], 0.0)
    return p, dot(gs, tl.trans(vs), PRECISION)


@triton.jit
def _low_query_grad_kernel(
    q, k, v, grad, norm, delta, grad_q, heads, QUERIES, KEYS_N, DIM, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, o0, o1, o2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of queries, over all keys; leaves ``delta`` for the keys' kernel."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D_BLOCK)
    qs = _rows_of(q, b, h, r, d, q0, q1, q2, QUERIES, DIM)
    gs = _rows_of(grad, b, h, r, d, g0, g1, g2, QUERIES, DIM)
    top = tl.load(norm + 2 * (bh * QUERIES + r), mask=r < QUERIES, other=float("inf"))
    total = tl.load(norm + 2 * (bh * QUERIES + r) + 1, mask=r < QUERIES, other=1.0)
    # The sum of p * gp over the keys is also the product of output and its gradient, without this
    # pass; but that is rounded apart from p and gp, and its difference to gp loses digits.
    drop = tl.zeros([ROWS], tl.float32)
    for start in range(0, KEYS_N, KEYS):
        n = start + tl.arange(0, KEYS)
        ks = _rows_of(k, b, h, n, d, k0, k1, k2, KEYS_N, DIM)
        vs = _rows_of(v, b, h, n, d, v0, v1, v2, KEYS_N, DIM)
        p, gp = _low_tile(qs, ks, vs, gs, top, total, n, KEYS_N, scale, PRECISION)
        drop += tl.sum(p * gp, axis=1)
    tl.store(delta + bh * QUERIES + r, drop, mask=r < QUERIES)
    acc = tl.zeros([ROWS, D_BLOCK], tl.float32)
    for start in range(0, KEYS_N, KEYS):
        n = start + tl.arange(0, KEYS)
        ks = _rows_of(k, b, h, n, d, k0, k1, k2, KEYS_N, DIM)
        vs = _rows_of(v, b, h, n, d, v0, v1, v2, KEYS_N, DIM)
        p, gp = _low_tile(qs, ks, vs, gs, top, total, n, KEYS_N, scale, PRECISION)
        ds = p * (gp - drop[:, None]) * scale
        acc += dot(ds.to(ks.dtype), ks, PRECISION)
    _put_rows(grad_q, acc, b, h, r, d, o0, o1, o2, QUERIES, DIM)


@triton.jit
def _low_key_grad_kernel(
    q, k, v, grad, norm, delta, grad_k, grad_v, heads, QUERIES, KEYS_N, DIM, scale,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, g0, g1, g2, o0, o1, o2,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values: over all queries."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    n = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, D_BLOCK)
    ks = _rows_of(k, b, h, n, d, k0, k1, k2, KEYS_N, DIM)
    vs = _rows_of(v, b, h, n, d, v0, v1, v2, KEYS_N, DIM)
    acc_k = tl.zeros([KEYS, D_BLOCK], tl.float32)
    acc_v = tl.zeros([KEYS, D_BLOCK], tl.float32)
    for start in range(0, QUERIES, ROWS):
        r = start + tl.arange(0, ROWS)
        qs = _rows_of(q, b, h, r, d, q0, q1, q2, QUERIES, DIM)
        gs = _rows_of(grad, b, h, r, d, g0, g1, g2, QUERIES, DIM)
        top = tl.load(norm + 2 * (bh * QUERIES + r), mask=r < QUERIES, other=float("inf"))
        total = tl.load(norm + 2 * (bh * QUERIES + r) + 1, mask=r < QUERIES, other=1.0)
        drop = tl.load(delta + bh * QUERIES + r, mask=r < QUERIES, other=0.0)
        p, gp = _low_tile(qs, ks, vs, gs, top, total, n, KEYS_N, scale, PRECISION)
        ds = p * (gp - drop[:, None]) * scale
        acc_v += dot(tl.trans(p).to(gs.dtype), gs, PRECISION)
        acc_k += dot(tl.trans(ds).to(qs.dtype), qs, PRECISION)
    _put_rows(grad_k, acc_k, b, h, n, d, o0, o1, o2, KEYS_N, DIM)
    _put_rows(grad_v, acc_v, b, h, n, d, o0, o1, o2, KEYS_N, DIM)


def _rowwise(t: Tensor) -> Tensor:
    """The last dimension next to one another in memory."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _switches(t: Tensor) -> dict[str, Any]:
    products = precision(t.dtype)
    block = max(16, triton.next_power_of_2(t.shape[-1]))
    return {"D_BLOCK": block, "PRECISION": products, "num_warps": warps(products)}


def _low_tiles(q: Tensor) -> dict[str, Any]:
    """Rows and keys of a tile of the low branch, and what its kernels are compiled for."""
    switches = _switches(q)
    side = SIDE // 2 if switches["PRECISION"] == "ieee" else SIDE
    return {"ROWS": side, "KEYS": side, **switches}


def _tile(ws: int) -> int:
    """Tokens of a tile: several windows while they are small."""
    return max(32, triton.next_power_of_2(ws * ws))


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
    ws: int, masked: bool,
) -> list[Tensor]:  # fmt: skip
    """q, k and v, padded unless the padding stays out."""
    if hidden(q.shape, ws, q.device) is not None and not masked:
        fills = zip((q, k, v), (None, pad_k, pad_v), strict=True)
        return [padded(t, ws, fill) for t, fill in fills]
    return [_rowwise(t) for t in (q, k, v)]


def _high_launch(kernel, inputs: list[Tensor], outputs: list[Tensor], ws: int, scale: float):
    q = inputs[0]
    b, height, width, heads, dim = q.shape
    rows, cols = grid(height, width, ws)
    windows = b * rows * cols
    tile = _tile(ws)
    strides = [n for t in (*inputs, outputs[0]) for n in t.stride()[:4]]
    launch(
        kernel, (triton.cdiv(windows, tile // (ws * ws)), heads),
        *inputs, *outputs, height, width, rows, cols, windows, dim, scale, *strides,
        WS=ws, TILE=tile, **_switches(q),
    )  # fmt: skip


def _high(out: Tensor, inputs: list[Tensor], ws: int, scale: float) -> None:
    """Fill ``out`` [B, H, W, h, d]; the inputs may be padded."""
    if inputs[0].shape == out.shape:
        _high_launch(_high_kernel, inputs, [out], ws, scale)
        return
    whole = torch.empty_like(inputs[0])
    _high_launch(_high_kernel, inputs, [whole], ws, scale)
    out.copy_(whole[:, : out.shape[1], : out.shape[2]])


def _flat(t: Tensor) -> Tensor:
    """[B, H, W, h, d] -> [B, H * W, h, d]."""
    return _rowwise(t.flatten(1, 2))


def _low_strides(*tensors: Tensor) -> list[int]:
    return [n for t in tensors for n in t.stride()[:3]]


def hilo_attention(
    q: Tensor | None, k: Tensor | None, v: Tensor | None,
    low_q: Tensor | None, low_k: Tensor | None, low_v: Tensor | None,
    pad_k: Tensor | None, pad_v: Tensor | None,
    ws: int, scale: float, masked: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[B, H, W, Hh + Hl, d]; of the low branch largest score and sum of every row, for later."""
    like = q if q is not None else low_q
    assert like is not None
    b, height, width, _, dim = like.shape
    split = 0 if q is None else q.shape[3]
    heads = 0 if low_q is None else low_q.shape[3]
    out = torch.empty(b, height, width, split + heads, dim, dtype=like.dtype, device=like.device)
    norm = torch.empty(0, device=like.device)
    if out.numel() == 0:
        return out, norm
    if q is not None and k is not None and v is not None and split:
        _high(out[:, :, :, :split], _prepared(q, k, v, pad_k, pad_v, ws, masked), ws, scale)
    if low_q is not None and low_k is not None and low_v is not None and heads:
        qf, kf, vf = _flat(low_q), _flat(low_k), _flat(low_v)
        of = out.flatten(1, 2)[:, :, split:]
        n, keys = qf.shape[1], kf.shape[1]
        norm = torch.empty(b, heads, n, 2, device=like.device)
        tile = _low_tiles(qf)
        launch(
            _low_kernel, (b * heads, triton.cdiv(n, tile["ROWS"])),
            qf, kf, vf, of, norm, heads, n, keys, dim, scale, *_low_strides(qf, kf, vf, of),
            **tile,
        )  # fmt: skip
    return out, norm


def high_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, pad_k: Tensor | None, pad_v: Tensor | None,
    ws: int, scale: float, masked: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and of the padded key and value."""
    inputs = _prepared(q, k, v, pad_k, pad_v, ws, masked)
    height, width = q.shape[1:3]
    g = _rowwise(grad) if inputs[0].shape == grad.shape else padded(grad, ws, None)
    outputs = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
    _high_launch(_high_backward_kernel, [*inputs, g], outputs, ws, scale)
    found: list[Tensor | None] = [t[:, :height, :width] for t in outputs]
    for pad, t in ((pad_k, outputs[1]), (pad_v, outputs[2])):
        if pad is None or t.shape == q.shape:
            found.append(None if pad is None else torch.zeros_like(pad))
        else:
            wide = t.float()
            below, right = wide[:, height:], wide[:, :height, width:]
            found.append(below.sum((0, 1, 2)) + right.sum((0, 1, 2)))
    return found


def low_backward(
    grad: Tensor, _out: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> list[Tensor | None]:
    """Gradients of the low branch, shaped like q, k and v; ``norm`` from the forward."""
    gf, qf, kf, vf = (_flat(t) for t in (grad, q, k, v))
    b, n, heads, dim = qf.shape
    keys = kf.shape[1]
    delta = torch.empty(b, heads, n, device=q.device)
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (qf, kf, vf)]
    shared = (qf, kf, vf, gf, norm, delta)
    numbers = (heads, n, keys, dim, scale, *_low_strides(qf, kf, vf, gf))
    tile = _low_tiles(qf)
    launch(
        _low_query_grad_kernel, (b * heads, triton.cdiv(n, tile["ROWS"])),
        *shared, grads[0], *numbers, *_low_strides(grads[0]), **tile,
    )  # fmt: skip
    launch(
        _low_key_grad_kernel, (b * heads, triton.cdiv(keys, tile["KEYS"])),
        *shared, *grads[1:], *numbers, *_low_strides(grads[1]), **tile,
    )  # fmt: skip
    return [g.view(t.shape) for g, t in zip(grads, (q, k, v), strict=True)]
