# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton path: each output row is summed by one program in the order of its entries.

Entries are sorted by slot first, so there are no atomics and the result does not change from
run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from visprune.kernels.common.triton_launch import launch


@triton.jit
def _reduce_kernel(
    x, order, starts, source, weight, out, tokens, entries, slots, dim, sx0, sx1, sx2,
    SOURCE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One slot, one block of features: add its entries."""
    row = tl.program_id(0).to(tl.int64)
    b = row // slots
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + b * (slots + 1) + row % slots)
    last = tl.load(starts + b * (slots + 1) + row % slots + 1)
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(first, last):
        e = tl.load(order + b * entries + i)
        token = e
        if SOURCE:
            token = tl.load(source + b * entries + e)
        # Not `(token >= 0) & (at < dim)`: Triton 3.9's interpreter makes that an integer, no mask.
        ok = at < tl.where(token >= 0, dim, 0)
        value = tl.load(x + b * sx0 + token * sx1 + at * sx2, mask=ok, other=0.0).to(tl.float32)
        if WEIGHT:
            value *= tl.load(weight + b * entries + e)
        acc += value
    tl.store(out + row * dim + at, acc.to(out.dtype.element_ty), mask=at < dim)


@triton.jit
def _best_partner_kernel(
    metric, value, partner, count, dim, CLASS: tl.constexpr, DISTILL: tl.constexpr,
    EVEN: tl.constexpr, ODD: tl.constexpr, D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Best odd token (value, index) for a block of even tokens; ``metric`` has unit rows."""
    b = tl.program_id(0).to(tl.int64)
    evens, odds = (count + 1) // 2, count // 2
    i = tl.program_id(1) * EVEN + tl.arange(0, EVEN)
    d = tl.arange(0, D_BLOCK)
    base = metric + b * count * dim
    best = tl.full([EVEN], float("-inf"), tl.float32)
    index = tl.zeros([EVEN], tl.int64)
    for start in range(0, odds, ODD):
        j = start + tl.arange(0, ODD)
        s = tl.zeros([EVEN, ODD], tl.float32)
        for d0 in range(0, dim, D_BLOCK):
            dd = d0 + d
            a = tl.load(
                base + (2 * i)[:, None] * dim + dd[None],
                mask=(i < evens)[:, None] & (dd < dim)[None],
                other=0.0,
            )
            o = tl.load(
                base + (2 * j + 1)[None] * dim + dd[:, None],
                mask=(j < odds)[None] & (dd < dim)[:, None],
                other=0.0,
            )
            s += tl.dot(a, o, input_precision="ieee")  # a near tie is decided by the last bits
        s = tl.where((j < odds)[None], s, float("-inf"))
        if DISTILL:
            s = tl.where((j == 0)[None], float("-inf"), s)
        if CLASS:
            s = tl.where((i == 0)[:, None], float("-inf"), s)
        top = tl.max(s, axis=1)
        where = start + tl.argmax(s, axis=1, tie_break_left=True)
        better = top > best  # strictly: the lower index keeps a tie
        index = tl.where(better, where.to(tl.int64), index)
        best = tl.maximum(best, top)
    tl.store(value + b * evens + i, best, mask=i < evens)
    tl.store(partner + b * evens + i, index, mask=i < evens)


def reduce_tokens(
    x: Tensor, source: Tensor | None, slot: Tensor | None, weight: Tensor | None, num_slots: int
) -> Tensor:
    """``x`` [B, N, D] -> [B, num_slots, D]."""
    batch, tokens, dim = x.shape
    out = torch.empty(batch, num_slots, dim, device=x.device, dtype=x.dtype)
    if out.numel() == 0:
        return out
    entries = tokens if source is None else source.shape[1]
    order, starts = _by_slot(slot, batch, entries, num_slots, x.device)
    source = source if source is None else source.contiguous()
    weight = weight if weight is None else weight.float().contiguous()
    block = min(1024, triton.next_power_of_2(dim))
    launch(
        _reduce_kernel, (batch * num_slots, triton.cdiv(dim, block)),
        x, order, starts, order if source is None else source,
        x if weight is None else weight, out, tokens, entries, num_slots, dim, *x.stride(),
        SOURCE=source is not None, WEIGHT=weight is not None, BLOCK=block,
    )  # fmt: skip
    return out


def _by_slot(
    slot: Tensor | None, batch: int, entries: int, num_slots: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Entries in slot order [B, E] and where each slot starts [B, K + 1]; dropped ones last."""
    if slot is None:
        order = torch.arange(entries, device=device).expand(batch, -1).contiguous()
        starts = torch.arange(num_slots + 1, device=device).expand(batch, -1).contiguous()
        return order, starts
    ranked, order = torch.where(slot < 0, num_slots, slot).sort(dim=1, stable=True)
    edges = torch.arange(num_slots + 1, device=device).expand(batch, -1).contiguous()
    return order, torch.searchsorted(ranked.contiguous(), edges)


def best_partners(metric: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor]:
    """For each even token its best cosine to an odd token, and that partner -> [B, ceil(T/2)]."""
    batch, count, dim = metric.shape
    metric = metric.float()
    norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
    metric = (metric * torch.where(norm > 0, 1 / norm, 0.0)).contiguous()
    evens = (count + 1) // 2
    value = torch.empty(batch, evens, device=metric.device)
    partner = torch.empty(batch, evens, dtype=torch.long, device=metric.device)
    launch(
        _best_partner_kernel, (batch, triton.cdiv(evens, 16)),
        metric, value, partner, count, dim, CLASS=class_token, DISTILL=distill_token,
        EVEN=16, ODD=32, D_BLOCK=min(64, max(16, triton.next_power_of_2(dim))),
    )  # fmt: skip
    return value, partner
