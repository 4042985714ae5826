# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of ragged decoding: blocks of all heads in one product, or head by head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from visprune.kernels.common.precision import wide

from . import quantize

# Where all heads start at a multiple of one, they share two batched products. The larger is
# faster, the smaller wastes less of a short head.
BLOCKS = (64, 32)
MAX_SCORES = 1 << 24  # scores held at once (fp32: 64 MiB)
FEW_HEADS = 8  # that one thread reads one by one in less time than their blocks together
CHUNK = 4096  # slots of one head written out at once where they are not fp32 as they lie

Rows = Callable[[int, int], Tensor]  # slots first..last -> [slots, d]


def segments(offsets: Tensor, lengths: Tensor | None) -> tuple[list[int], list[int]]:
    """Starts of all segments and the end of the storage, and how many slots each uses."""
    starts = offsets.tolist()
    if lengths is not None:
        return starts, lengths.tolist()
    return starts, [b - a for a, b in pairwise(starts)]


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
    """``q`` [B, H, R, d] -> [B, H, R, dv] in its dtype and fp32 LSE [B, H, R]."""
    starts, counts = segments(offsets, lengths)
    rows, dtype = _grouped(q, len(counts)), q.dtype
    bias = None if bias is None else bias.to(rows.dtype)
    block = _block(starts, rows.shape[1], q, k, v)
    alone = bias is None and not (with_lse or softcap or causal) and all(counts)
    if block and alone and len(counts) <= FEW_HEADS and torch.get_num_threads() == 1:
        out = _one_by_one(rows, k, v, starts, counts, scale)
        return out.reshape(*q.shape[:3], v.shape[1]), out.new_zeros(q.shape[:3])
    if block and not (with_lse or softcap or causal):
        out = _by_blocks(rows, k, v, starts, counts, scale, bias, block)
        # What lies in the room behind a segment has weight 0; where it was not finite, 0 * it is
        # NaN. Then every head is read by itself.
        if math.isfinite(out.sum().item()):
            return out.reshape(*q.shape[:3], v.shape[1]), out.new_zeros(q.shape[:3])
    chunk = starts[-1] if k.dtype == rows.dtype else CHUNK
    limits = (causal, q.shape[2])
    out, lse = _by_heads(
        rows, lambda a, b: wide(k[a:b]), lambda a, b: wide(v[a:b]), v.shape[1],
        starts, counts, scale, bias, limits, softcap, chunk,
    )  # fmt: skip
    return out.reshape(*q.shape[:3], v.shape[1]).to(dtype), lse.reshape(q.shape[:3])


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
    """The same over codes, of which ``CHUNK`` slots of one head are numbers at a time."""
    starts, counts = segments(offsets, lengths)
    rows = _grouped(q, len(counts))
    keys = _reader(k, k_scale, k_zero, bits[0], groups[0], per_channel[0])
    values = _reader(v, v_scale, v_zero, bits[1], groups[1], per_channel[1])
    dv = v.shape[1] * 8 // bits[1]
    bias = None if bias is None else bias.to(rows.dtype)
    out, lse = _by_heads(
        rows, keys, values, dv, starts, counts, scale, bias, (causal, q.shape[2]), softcap, CHUNK
    )  # fmt: skip
    return out.reshape(*q.shape[:3], dv).to(q.dtype), lse.reshape(q.shape[:3])


def _grouped(q: Tensor, count: int) -> Tensor:
    """[B, H, R, d] -> [B * Hkv, H / Hkv * R, d]: all rows that read one segment."""
    b, h, r, d = q.shape
    return wide(q).reshape(count, b * h * r // count if count else 0, d)


def _reader(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int, per_channel: bool
) -> Rows:
    """Slots as numbers. Groups of slots are read whole, whatever slot a segment starts at."""

    def read(first: int, last: int) -> Tensor:
        if not per_channel:
            part = (codes[first:last], scale[first:last], zero[first:last])
            return quantize.dequantize(*part, bits, group, False)
        begin, at = first // group * group, slice(first // group, -(-last // group))
        part = (codes[begin : at.stop * group], scale[at], zero[at])
        return quantize.dequantize(*part, bits, group, True)[first - begin : last - begin]

    return read


# --- all heads at once ----------------------------------------------------------------------------


def _block(starts: list[int], rows: int, q: Tensor, k: Tensor, v: Tensor) -> int:
    """The block that every segment is a multiple of; 0 where heads are read one by one."""
    same = k.dtype == v.dtype == q.dtype and q.dtype in (torch.float32, torch.float64)
    if not same or not q.is_cpu or not 0 < starts[-1] * rows <= MAX_SCORES:
        return 0
    return next((b for b in BLOCKS if not any(s % b for s in starts)), 0)


def _one_by_one(
    rows: Tensor, k: Tensor, v: Tensor, starts: list[int], counts: list[int], scale: float
) -> Tensor:
    """[segments, rows, dv] by PyTorch's own attention, a call for each segment.

    On one thread a call takes less than the steps between the products of all blocks. On several
    each call wakes them all for too little work.
    """
    parts = [
        scaled_dot_product_attention(
            rows[n, None, None], k[None, None, a : a + size], v[None, None, a : a + size],
            scale=scale,
        )
        for n, (a, size) in enumerate(zip(starts, counts, strict=False))
    ]  # fmt: skip
    return torch.cat(parts)[:, 0]


@functools.lru_cache(maxsize=128)
def _lattice(starts: tuple[int, ...], block: int) -> tuple[Tensor, Tensor]:
    """The segment of every block, and of every slot its place in its segment [blocks, block].

    Remembered, since a cache grows into its room for long before its layout changes.
    """
    sizes = torch.tensor([(b - a) // block for a, b in pairwise(starts)])
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    place = torch.arange(starts[-1], dtype=torch.int32).view(-1, block)
    return owner, place - torch.tensor(starts, dtype=torch.int32)[owner][:, None]


def _by_blocks(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    starts: list[int],
    counts: list[int],
    scale: float,
    bias: Tensor | None,
    block: int,
) -> Tensor:
    """[segments, rows, dv]. The storage is one lattice of blocks, each of one segment.

    So all heads take two batched products; the room behind a segment has weight 0.
    """
    owner, place = _lattice(tuple(starts), block)
    keys, values = (x[: starts[-1]].unflatten(0, (-1, block)) for x in (k, v))
    queries = (rows * scale).index_select(0, owner)
    # Keys on the left, as they lie: a fifth faster from memory than the other way round.
    scores = torch.bmm(keys, queries.mT).flatten(0, 1).t().contiguous()  # [rows, slots]
    if bias is not None:
        scores += bias[: starts[-1]]
    room = place >= torch.tensor(counts, dtype=torch.int32).index_select(0, owner)[:, None]
    scores = scores.unflatten(1, (-1, block))
    total = _exponentials(scores, room, owner, len(counts))
    mixed = torch.bmm(scores.transpose(0, 1), values)
    out = mixed.new_zeros(len(counts), rows.shape[1], v.shape[1]).index_add_(0, owner, mixed)
    return out.div_(total.t()[..., None])


def _exponentials(scores: Tensor, room: Tensor, owner: Tensor, segments: int) -> Tensor:
    """Softmax numerators of [rows, blocks, BLOCK] in place -> denominators [rows, segments].

    A handful of calls for any number of heads, where a softmax each would take as long as the
    products of short heads do. What is ``room`` [blocks, BLOCK] is 0; a segment of nothing but -inf
    has zeros over a small number.
    """
    scores.masked_fill_(room, -torch.inf)
    at = owner.expand(len(scores), -1)
    top = scores.new_full((len(scores), segments), -torch.inf)
    top.scatter_reduce_(1, at, scores.amax(-1), "amax")
    top.clamp_min_(torch.finfo(top.dtype).min)  # -inf less -inf would be NaN
    # MKL's exp takes five times as long at -inf.
    scores.sub_(top.gather(1, at)[..., None]).masked_fill_(room, 0.0).exp_().masked_fill_(room, 0.0)
    total = torch.zeros_like(top).scatter_add_(1, at, scores.sum(-1))
    return total.clamp_min_(torch.finfo(total.dtype).tiny)  # at least 1 but where all are -inf


# --- head by head ---------------------------------------------------------------------------------


def _by_heads(
    rows: Tensor,
    keys: Rows,
    values: Rows,
    dv: int,
    starts: list[int],
    counts: list[int],
    scale: float,
    bias: Tensor | None,
    limits: tuple[bool, int],
    softcap: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """[segments, rows, dv] and LSE [segments, rows], ``chunk`` slots at a time."""
    out = rows.new_zeros(len(counts), rows.shape[1], dv)
    lse = rows.new_full((len(counts), rows.shape[1]), -torch.inf)
    if 0 in rows.shape[:2]:
        return out, lse
    room = max(1, min(chunk, MAX_SCORES // rows.shape[1]))
    for i, count in enumerate(counts):
        first = starts[i]
        for a in range(first, first + count, room):
            b = min(a + room, first + count)
            s = (rows[i] @ keys(a, b).to(rows.dtype).mT) * scale
            s = softcap * torch.tanh(s / softcap) if softcap else s
            s = s if bias is None else s + bias[a:b]
            if limits[0]:
                s = _see_the_past(s, limits[1], a - first, count)
            _add(out[i], lse[i], s, values(a, b).to(rows.dtype), fresh=a == first)
    return out, lse


def _see_the_past(s: Tensor, queries: int, place: int, count: int) -> Tensor:
    """Query r of R sees the slots up to ``count - R + r``; ``s`` starts at slot ``place``."""
    slot = torch.arange(place, place + s.shape[1], device=s.device)
    last = torch.arange(count - queries, count, device=s.device).repeat(len(s) // queries)
    return s.masked_fill(slot > last[:, None], -torch.inf)


def _add(out: Tensor, lse: Tensor, s: Tensor, v: Tensor, fresh: bool) -> None:
    """Take the slots of ``s`` [rows, slots] into ``out`` [rows, dv] and ``lse`` [rows]."""
    here = torch.logsumexp(s, -1)
    part = torch.softmax(s, -1).masked_fill_(here.isneginf()[:, None], 0.0) @ v
    if fresh:
        out.copy_(part)
        lse.copy_(here)
        return
    both = torch.logaddexp(lse, here)
    safe = both.masked_fill(both.isneginf(), 0.0)  # exp(-inf - 0) is 0, not NaN
    out.mul_((lse - safe).exp_()[:, None]).add_(part * (here - safe).exp_()[:, None])
    lse.copy_(both)
