# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path: two passes, so that nothing larger than the result is ever written.

Pass 1 finds the log-sum-exp of every row and head; pass 2 turns scores into probabilities and
reduces them on the way out, over heads (rows) or over rows (column sums). No atomics: the same
input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import dot, launch, precision

ROWS, KEYS = 16, 64


@triton.jit
def _scores(
    q, k, mask, pos, b, h, r, n, group, ROWS_N, KEYS_N, DIM,
    sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    D_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Masked scores [rows, keys] of one head; -inf outside and where hidden."""
    d = tl.arange(0, D_BLOCK)
    q_at = q + b * sq0 + h * sq1 + r[:, None].to(tl.int64) * sq2 + d[None]
    k_at = k + b * sk0 + (h // group) * sk1 + n[None].to(tl.int64) * sk2 + d[:, None]
    qs = tl.load(q_at, mask=(r < ROWS_N)[:, None] & (d < DIM)[None], other=0.0)
    ks = tl.load(k_at, mask=(n < KEYS_N)[None] & (d < DIM)[:, None], other=0.0)
    s = dot(qs, ks, PRECISION) * scale
    if CAP:
        e = tl.exp(-2.0 * tl.abs(s / softcap))  # tanh without overflow
        s = softcap * tl.where(s < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    inside = (r < ROWS_N)[:, None] & (n < KEYS_N)[None]
    if MASK > 0:
        m_at = mask + b * sm0 + h * sm1 + r[:, None].to(tl.int64) * sm2 + n[None] * sm3
        if MASK == 1:
            inside = inside & (tl.load(m_at, mask=inside, other=0) != 0)
        else:
            s += tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
    if CAUSAL:
        last = tl.load(pos + b * sp0 + r, mask=r < ROWS_N, other=-1)
        inside = inside & (n[None] <= last[:, None])
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _lse_kernel(
    q, k, mask, pos, lse, heads, group, ROWS_N, KEYS_N, DIM,
    sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    D_BLOCK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp [B, H, R] of a block of rows; +inf for a row without keys, so that it is 0."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, KEYS_N, KEYS):
        n = start + tl.arange(0, KEYS)
        s = _scores(
            q, k, mask, pos, b, h, r, n, group, ROWS_N, KEYS_N, DIM,
            sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
            MASK, CAUSAL, CAP, D_BLOCK, PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), axis=1)
        top = new
    some = total > 0
    value = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse + bh * ROWS_N + r, value, mask=r < ROWS_N)


@triton.jit
def _rows_kernel(
    q, k, mask, pos, lse, out, heads, group, ROWS_N, KEYS_N, DIM,
    sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    D_BLOCK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """Probabilities of a block of rows and keys. REDUCE: 0 none, 1 sum, 2 max over heads."""
    bh = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(2) * KEYS + tl.arange(0, KEYS)
    b = bh
    first, count = 0, heads
    if REDUCE == 0:
        b = bh // heads
        first, count = (bh % heads).to(tl.int32), 1
    acc = tl.zeros([ROWS, KEYS], tl.float32)
    for step in range(count):
        h = first + step
        s = _scores(
            q, k, mask, pos, b, h, r, n, group, ROWS_N, KEYS_N, DIM,
            sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
            MASK, CAUSAL, CAP, D_BLOCK, PRECISION,
        )  # fmt: skip
        total = tl.load(lse + (b * heads + h) * ROWS_N + r, mask=r < ROWS_N, other=float("inf"))
        p = tl.exp(s - total[:, None])
        if REDUCE == 2:
            acc = tl.maximum(acc, p)
        else:
            acc += p
    o_at = out + (bh * ROWS_N + r[:, None].to(tl.int64)) * KEYS_N + n[None]
    tl.store(o_at, acc, mask=(r < ROWS_N)[:, None] & (n < KEYS_N)[None])


@triton.jit
def _columns_kernel(
    q, k, mask, pos, lse, weight, out, heads, group, ROWS_N, KEYS_N, DIM,
    sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    D_BLOCK: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Sum of weight times probability over all rows, for a block of keys of one head."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // heads, bh % heads
    n = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    acc = tl.zeros([KEYS], tl.float32)
    for start in range(0, ROWS_N, ROWS):
        r = start + tl.arange(0, ROWS)
        s = _scores(
            q, k, mask, pos, b, h, r, n, group, ROWS_N, KEYS_N, DIM,
            sq0, sq1, sq2, sk0, sk1, sk2, sm0, sm1, sm2, sm3, sp0, scale, softcap,
            MASK, CAUSAL, CAP, D_BLOCK, PRECISION,
        )  # fmt: skip
        total = tl.load(lse + bh * ROWS_N + r, mask=r < ROWS_N, other=float("inf"))
        w = tl.load(weight + b * ROWS_N + r, mask=r < ROWS_N, other=0.0)
        acc += tl.sum(tl.exp(s - total[:, None]) * w[:, None], axis=0)
    tl.store(out + bh * KEYS_N + n, acc, mask=n < KEYS_N)


def _arguments(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, pos: Tensor | None, softcap: float
) -> tuple[list[Tensor], list[int | float], dict[str, Any]]:
    """Tensors, numbers and compile-time switches that all kernels share."""
    b, h, r, d = q.shape
    n = k.shape[2]
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    kind = 0
    m_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        wide = mask.to(torch.int8) if kind == 1 else mask
        mask = wide.expand(b, h, r, n)
        m_strides = mask.stride()
    if pos is not None:
        pos = pos.expand(b, r).contiguous()
    tensors = [q, k, q if mask is None else mask, q if pos is None else pos]
    numbers = [
        h // k.shape[1], r, n, d, *q.stride()[:3], *k.stride()[:3], *m_strides,
        0 if pos is None else pos.stride(0), scale, softcap,
    ]  # fmt: skip
    switches = {
        "MASK": kind,
        "CAUSAL": pos is not None,
        "CAP": softcap > 0,
        "D_BLOCK": max(16, triton.next_power_of_2(d)),
        "PRECISION": precision(q.dtype),
        "ROWS": ROWS,
        "KEYS": KEYS,
    }
    return tensors, numbers, switches


def _log_sum_exp(
    q: Tensor, heads: int, rows: int, tensors: list[Tensor], numbers: list, switches: dict
) -> Tensor:
    lse = torch.empty(len(q), heads, rows, device=q.device)
    grid = (len(q) * heads, triton.cdiv(rows, ROWS))
    launch(_lse_kernel, grid, *tensors, lse, heads, *numbers, **switches)
    return lse


def attention_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    row_pos: Tensor | None,
    reduce: str,
    softcap: float,
) -> Tensor:
    """fp32 [B, H, R, N], or [B, R, N] if reduced."""
    b, h, r, _ = q.shape
    n = k.shape[2]
    shape = (b, h, r, n) if reduce == "none" else (b, r, n)
    if 0 in (b, r, n):
        return torch.zeros(shape, device=q.device)
    out = torch.empty(shape, device=q.device)
    tensors, numbers, switches = _arguments(q, k, scale, mask, row_pos, softcap)
    lse = _log_sum_exp(q, h, r, tensors, numbers, switches)
    grid = (b * (h if reduce == "none" else 1), triton.cdiv(r, ROWS), triton.cdiv(n, KEYS))
    code = {"none": 0, "sum": 1, "mean": 1, "max": 2}[reduce]
    launch(_rows_kernel, grid, *tensors, lse, out, h, *numbers, **switches, REDUCE=code)
    return out / h if reduce == "mean" else out


def column_sums(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    row_weight: Tensor | None,
    reduce: str,
    softcap: float,
) -> Tensor:
    """fp32 [B, N], or [B, H, N] for ``none``."""
    b, h, r, _ = q.shape
    n = k.shape[2]
    if 0 in (b, r, n):
        return torch.zeros((b, h, n) if reduce == "none" else (b, n), device=q.device)
    pos = torch.arange(n - r, n, device=q.device)[None] if causal else None
    weight = q.new_ones(b, r, dtype=torch.float32) if row_weight is None else row_weight.float()
    tensors, numbers, switches = _arguments(q, k, scale, mask, pos, softcap)
    lse = _log_sum_exp(q, h, r, tensors, numbers, switches)
    out = torch.empty(b, h, n, device=q.device)
    grid = (b * h, triton.cdiv(n, KEYS))
    launch(_columns_kernel, grid, *tensors, lse, weight.contiguous(), out, h, *numbers, **switches)
    return out if reduce == "none" else out.mean(1) if reduce == "mean" else out.sum(1)
