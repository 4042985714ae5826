# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path: every segment in splits, so that few heads fill the device; then the splits merge.

One program reads a part of one segment once for all rows of its group. How long a segment is stays
on the device: the host never waits for it. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import dot, launch, precision

ROWS, KEYS = 16, 64
PROGRAMS = 528  # four for each multiprocessor of an H100: enough to hide the loads of one another


@triton.jit
def _numbers(
    x, scale, zero, n, c, inside, stride, DIM, group,
    BITS: tl.constexpr, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Slots ``n`` and channels ``c`` of keys or values; from codes if there are ``BITS``."""
    if BITS == 0:
        numbers = tl.load(x + n * stride + c, mask=inside, other=0.0)
    else:
        width = DIM // (8 // BITS)
        byte = tl.load(x + n * stride + c % width, mask=inside, other=0).to(tl.int32)
        code = (byte >> ((c // width) * BITS)) & ((1 << BITS) - 1)
        if PER_CHANNEL:
            at = (n // group) * DIM + c
        else:
            at = n * ((DIM + group - 1) // group) + c // group
        step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        least = tl.load(zero + at, mask=inside, other=0.0).to(tl.float32)
        numbers = code.to(tl.float32) * step + least
    return numbers


@triton.jit
def _split_kernel(
    q, k, ks, kz, v, vs, vz, bias, offsets, lengths, acc, top_out, total_out,
    segments, rows, QUERIES, DIM, DV, sk, sv, group_k, group_v, scale, softcap,
    LENGTHS: tl.constexpr, BIAS: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
    BITS_K: tl.constexpr, BITS_V: tl.constexpr, CHANNEL_K: tl.constexpr, CHANNEL_V: tl.constexpr,
    D_BLOCK: tl.constexpr, DV_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Unnormalised sum, largest score and weight of one split of one segment, for ROWS rows."""
    segment = tl.program_id(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    first = tl.load(offsets + segment)
    if LENGTHS:
        count = tl.load(lengths + segment)
    else:
        count = tl.load(offsets + segment + 1) - first
    d, e = tl.arange(0, D_BLOCK), tl.arange(0, DV_BLOCK)
    q_at = q + (segment * rows + r[:, None]) * DIM + d[None]
    qs = tl.load(q_at, mask=(r < rows)[:, None] & (d < DIM)[None], other=0.0)
    seen = tl.zeros([ROWS], tl.int64) + count
    if CAUSAL:
        seen = count - QUERIES + (r % QUERIES) + 1
    part = tl.cdiv(tl.cdiv(count, KEYS), splits) * KEYS
    last = tl.minimum((split + 1) * part, count)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DV_BLOCK], tl.float32)
    for start in range(split * part, last, KEYS):
        place = start + tl.arange(0, KEYS).to(tl.int64)
        n, here = first + place, place < last
        keys = _numbers(
            k, ks, kz, n[None], d[:, None], here[None] & (d < DIM)[:, None], sk, DIM, group_k,
            BITS_K, CHANNEL_K,
        ).to(qs.dtype)  # fmt: skip
        s = dot(qs, keys, PRECISION) * scale
        if CAP:
            x = tl.exp(-2.0 * tl.abs(s / softcap))  # tanh without overflow
            s = softcap * tl.where(s < 0, -1.0, 1.0) * (1.0 - x) / (1.0 + x)
        if BIAS:
            s += tl.load(bias + n, mask=here, other=0.0).to(tl.float32)[None]
        s = tl.where(here[None] & (place[None] < seen[:, None]), s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp(s - safe[:, None])
        fade = tl.exp(top - safe)
        values = _numbers(
            v, vs, vz, n[:, None], e[None], here[:, None] & (e < DV)[None], sv, DV, group_v,
            BITS_V, CHANNEL_V,
        ).to(qs.dtype)  # fmt: skip
        total = total * fade + tl.sum(p, axis=1)
        mixed = mixed * fade[:, None] + dot(p.to(qs.dtype), values, PRECISION)
        top = new
    at = (split * segments + segment) * rows + r
    tl.store(top_out + at, top, mask=r < rows)
    tl.store(total_out + at, total, mask=r < rows)
    inside = (r < rows)[:, None] & (e < DV)[None]
    tl.store(acc + at[:, None] * DV + e[None], mixed, mask=inside)


@triton.jit
def _merge_kernel(
    acc, top_in, total_in, out, lse, count, splits, DV, DV_BLOCK: tl.constexpr
):  # fmt: skip
    """One row of one segment from its splits; zero, and an LSE of -inf, if it saw no slot."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, DV_BLOCK)
    top = tl.full([1], float("-inf"), tl.float32)
    for i in range(splits):
        top = tl.maximum(top, tl.load(top_in + i * count + row))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([DV_BLOCK], tl.float32)
    for i in range(splits):
        at = i * count + row
        weight = tl.exp(tl.load(top_in + at) - safe)
        total += weight * tl.load(total_in + at)
        mixed += weight * tl.load(acc + at * DV + e, mask=e < DV, other=0.0)
    some = total > 0
    mixed = tl.where(some, mixed / tl.where(some, total, 1.0), 0.0 * mixed)
    tl.store(out + row * DV + e, mixed.to(out.dtype.element_ty), mask=e < DV)
    value = tl.where(some, safe + tl.log(tl.where(some, total, 1.0)), top)
    tl.store(lse + row + tl.arange(0, 1), value)


def _run(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    values: tuple[Tensor, Tensor, Tensor],
    dv: int,
    bits: Sequence[int],
    groups: Sequence[int],
    per_channel: Sequence[bool],
    offsets: Tensor,
    lengths: Tensor | None,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    b, h, queries, d = q.shape
    segments = len(offsets) - 1
    out, lse = q.new_empty(b, h, queries, dv), torch.empty(b, h, queries, device=q.device)
    if out.numel() == 0:
        return out, lse.fill_(-torch.inf)
    rows = b * h * queries // segments
    blocks = triton.cdiv(rows, ROWS)
    longest = triton.cdiv(len(keys[0]), KEYS)  # were all slots those of one head
    splits = max(1, min(triton.cdiv(PROGRAMS, segments * blocks), longest))
    acc = torch.empty(splits, segments * rows, dv, device=q.device)
    top, total = torch.empty(2, splits, segments * rows, device=q.device)
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (keys[0], values[0]))
    scales = [t.contiguous() for t in (*keys[1:], *values[1:])]
    switches: dict[str, Any] = {
        "LENGTHS": lengths is not None,
        "BIAS": bias is not None,
        "CAUSAL": causal,
        "CAP": softcap > 0,
        "BITS_K": bits[0],
        "BITS_V": bits[1],
        "CHANNEL_K": per_channel[0],
        "CHANNEL_V": per_channel[1],
        "D_BLOCK": max(16, triton.next_power_of_2(d)),
        "DV_BLOCK": max(16, triton.next_power_of_2(dv)),
        "PRECISION": precision(q.dtype),
        "ROWS": ROWS,
        "KEYS": KEYS,
    }
    launch(
        _split_kernel, (segments, splits, blocks),
        q.contiguous(), k, *scales[:2], v, *scales[2:],
        top if bias is None else bias.contiguous(), offsets.contiguous(),
        offsets if lengths is None else lengths.contiguous(), acc, top, total,
        segments, rows, queries, d, dv, k.stride(0), v.stride(0), *groups, scale, softcap,
        **switches,
    )  # fmt: skip
    launch(
        _merge_kernel, (segments * rows,), acc, top, total, out, lse, segments * rows, splits, dv,
        DV_BLOCK=switches["DV_BLOCK"],
    )  # fmt: skip
    return out, lse


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
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """[B, H, R, dv] in the dtype of ``q``, fp32 LSE [B, H, R]."""
    rest = (offsets, lengths, scale, bias, causal, softcap)
    no, one = (False, False), (1, 1)
    return _run(q, (k, k, k), (v, v, v), v.shape[1], (0, 0), one, no, *rest)


def ragged_decode_quantized(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    bits: Sequence[int],
    groups: Sequence[int],
    per_channel: Sequence[bool],
    offsets: Tensor,
    lengths: Tensor | None,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    softcap: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The same over codes, which become numbers in registers."""
    keys, values = (k, k_scale, k_zero), (v, v_scale, v_zero)
    dv = v.shape[1] * 8 // bits[1]
    rest = (offsets, lengths, scale, bias, causal, softcap)
    return _run(q, keys, values, dv, bits, groups, per_channel, *rest)
