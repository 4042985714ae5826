# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of small pictures: bands of whole rows through PyTorch's fused CPU attention.

Where tiles would be few and small, their copies and calls cost more than the scores they save.
Here the queries of some rows meet all tokens of the rows that their windows reach, under an
additive mask; nothing is copied, and one band of all rows is dense attention. A window that is the
whole picture needs no mask. Which of the two ways is taken, and how many bands, is a matter of
measured cost (:func:`chosen`); masks are remembered and never hold more than ``MAX_MASK`` numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import axis as axes
from . import tiles, whole_groups
from .axis import Axis, Layout, product

MAX_MASK = 1 << 19  # numbers in the masks of a layout: fp32 2 MiB
MIN_ROWS = 128  # queries of a band: the fused kernel is slow on few
MAX_KEYS = 512  # of a band: the block of the fused kernel, so that no block is masked whole
# What things cost, in scores of a tile (two products of width 32 and a softmax: 2.4 ns on two
# AVX2 threads; the README names the machine).
ROUND = 100e3  # tiles: the calls of one choice of runs, and of the custom op
HALO, QUERY = 25.0, 25.0  # tiles: one key of a halo, one query
IN_CACHE, OUTSIDE = 1 << 18, 1.4  # tiles: above so many scores all of that costs more
GRADIENT = 1.2  # tiles: factor where gradients are wanted; the fused kernel's are cheaper
BAND = 30e3  # bands: the calls of one, and more than one go through the custom op
FUSED, ROW = 0.55, 80.0  # bands: one score, one row
SPLIT = 1.15  # bands: factor where there are several, as the fused kernel is slower on fewer rows
MASKED, BIASED = 1.1, 0.6  # bands: factor of a mask; a bias looked up for one score


@dataclass(frozen=True, eq=False)
class Band:
    """Queries ``start`` to ``end`` and keys ``first`` to ``last`` of the flattened tokens.

    Attributes:
        entries: int64 [queries, keys], entry of each pair in a bias table of 2 k numbers per axis,
            the last of which stands for "no neighbour".
        mask: fp32 [queries, keys], 0 for a neighbour, else -inf; None if all are neighbours.
    """

    start: int
    end: int
    first: int
    last: int
    entries: Tensor
    mask: Tensor | None


def _offsets(axis: Axis) -> Tensor:
    """Bias index of every pair of an axis, int64 [L, L]; 2 k - 1 for no neighbour."""
    out = torch.full((axis.length, axis.length), 2 * axis.kernel - 1, device="cpu")
    for group, groups, count in axis.groups():
        for place in range(count):
            keys = torch.arange(*axis.window(place, count), device="cpu")
            for at in range(group, group + groups):
                row = at + axis.dilation * place
                out[row, at + axis.dilation * keys] = keys - place + axis.kernel - 1
    return out


def _rows(axis: Axis, count: int) -> list[tuple[int, int, int, int]]:
    """(first query, end, first key, end) of ``count`` bands of places along an axis."""
    reach = []
    for place in range(axis.length):
        group, inside = place % axis.dilation, place // axis.dilation
        total = (axis.length - group + axis.dilation - 1) // axis.dilation
        start, end = axis.window(inside, total)
        reach.append((group + axis.dilation * start, group + axis.dilation * (end - 1) + 1))
    cuts = [round(i * axis.length / count) for i in range(count + 1)]
    parts = [(a, b, reach[a:b]) for a, b in itertools.pairwise(cuts)]
    return [(a, b, min(r[0] for r in part), max(r[1] for r in part)) for a, b, part in parts]


def is_whole(layout: Layout) -> bool:
    """Whether every query sees every token."""
    return all(a.kernel == a.length and not a.causal for a in layout)


def tile_cost(layout: Layout, batch: int, heads: int) -> float:
    """Of the path over tiles, in its scores."""
    total, rounds, scores = 0.0, 0, 0
    for found in tiles.choices(layout):
        tile, span = (product(getattr(r, x) for r in found) for x in ("tile", "span"))
        count = product(len(r.starts) * r.groups for r in found) * batch * heads
        total += count * (tile * span + HALO * span + QUERY * tile)
        scores += count * tile * span
        rounds += 1
    return total * (OUTSIDE if scores > IN_CACHE else 1.0) + ROUND * rounds


def _cost(
    rows: Sequence[tuple[int, int, int, int]], width: int, batch: int, heads: int, biased: bool
) -> float:
    scores = sum((b - a) * (d - c) for a, b, c, d in rows) * width**2
    places = sum(b - a for a, b, _, _ in rows) * width
    total = MASKED * batch * heads * (FUSED * scores + ROW * places)
    if len(rows) > 1:
        total = SPLIT * total + BAND * (len(rows) + 1)
    return total + (BIASED * heads * scores if biased else 0.0)


@lru_cache(maxsize=256)
def chosen(layout: Layout, batch: int, heads: int, biased: bool, grad: bool = False) -> int:
    """The number of bands that is cheapest; 0 where tiles are cheaper, or masks too large.

    ``grad``: by the cost of a forward with its gradients.
    """
    if is_whole(layout) and not biased:
        return 1
    axis, width = layout[0], product(a.length for a in layout[1:])
    best, least = 0, None
    for count in range(1, max(1, min(axis.length, width * axis.length // MIN_ROWS)) + 1):
        rows = _rows(axis, count)
        held = sum((b - a) * (d - c) for a, b, c, d in rows) * width**2
        if held > MAX_MASK or max(d - c for _, _, c, d in rows) * width > MAX_KEYS:
            continue
        price = _cost(rows, width, batch, heads, biased)
        if least is None or price < least:
            best, least = count, price
    factor = GRADIENT if grad else 1.0
    if least is None or batch * heads == 0 or factor * tile_cost(layout, batch, heads) <= least:
        return 0
    return best


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is remembered must serve under autograd too
def bands(layout: Layout, count: int) -> tuple[Band, ...]:
    """``count`` bands of rows of the first axis with their masks."""
    size, width = product(a.length for a in layout), product(a.length for a in layout[1:])
    if is_whole(layout) and size > MAX_KEYS:  # nobody asks for the bias of so large a window
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        return (Band(0, size, 0, size, none, None),)
    per_axis = [_offsets(a)[None] for a in layout]
    index = tiles.interleave(per_axis, [2 * a.kernel for a in layout])[(0,) * len(layout)]
    apart = [(t == 2 * a.kernel - 1).long() for t, a in zip(per_axis, layout, strict=True)]
    hidden = tiles.interleave(apart, [1] * len(layout))[(0,) * len(layout)] > 0
    found = []
    for rows in _rows(layout[0], count):
        start, end, first, last = (place * width for place in rows)
        out = hidden[start:end, first:last]
        mask = torch.zeros(out.shape, device="cpu").masked_fill_(out, -torch.inf)
        entries = index[start:end, first:last].contiguous()
        found.append(Band(start, end, first, last, entries, mask if bool(out.any()) else None))
    return tuple(found)


def heads_first(t: Tensor) -> Tensor:
    """[B, *space, H, D] -> [B, H, N, D], a view where that can be."""
    shape, strides = t.shape, t.stride()
    together = all(strides[i] == shape[i + 1] * strides[i + 1] for i in range(1, len(shape) - 3))
    if not together or strides[-1] != 1:
        t = t.contiguous()
        strides = t.stride()
    size = shape[0], shape[-2], product(shape[1:-2]), shape[-1]
    # One call in place of two: they are a tenth of the time over 7 x 7 tokens.
    return t.as_strided(size, (strides[0], strides[-2], strides[-3], 1))


def _mask(band: Band, table: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores of a band: None, [queries, keys] or [1, H, queries, keys]."""
    if table is not None:
        found = table.index_select(1, band.entries.flatten())
        return found.view(1, len(table), *band.entries.shape)
    return band.mask if band.mask is None else band.mask.to(like.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, layout: Layout, scale: float, count: int
) -> tuple[Tensor, Tensor]:
    """Output [B, *space, H, D] and LSE [B, *space, H], both in fp32 (or fp64)."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    shape = q.shape
    if q.dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    qs, ks, vs = heads_first(q), heads_first(k), heads_first(v)
    table = None if rpb is None else tiles.bias_table(rpb, qs)
    found = bands(layout, count)
    if count == 1:
        got = fused(qs, ks, vs, attn_mask=_mask(found[0], table, qs), scale=scale)
        out, lse = (t.transpose(1, 2) for t in got)
        return out.contiguous().view(shape), lse.contiguous().view(shape[:-1])
    parts = []
    for band in found:
        keys = slice(band.first, band.last)
        part = qs[:, :, band.start : band.end], ks[:, :, keys], vs[:, :, keys]
        got = fused(*part, attn_mask=_mask(band, table, qs), scale=scale)
        parts.append([t.transpose(1, 2) for t in got])
    out, lse = (torch.cat(both, 1) for both in zip(*parts, strict=True))
    return out.view(shape), lse.view(shape[:-1])


def _back(t: Tensor, shape: torch.Size) -> Tensor:
    """[B, H, N, D] -> [B, *space, H, D]."""
    return t.transpose(1, 2).contiguous().view(shape)


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None, out: Tensor,
    lse: Tensor, layout: Layout, scale: float, count: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; bands share keys, whose gradients add up in the order of bands."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    # An expanded gradient, as of a sum, has strides of 0, which the kernel does not take.
    given = (grad_out.contiguous(), q, k, v, out)
    gs, qs, ks, vs, outs = (heads_first(t) for t in given)
    norm = lse.flatten(1, -2).transpose(1, 2)
    table = None if rpb is None else tiles.bias_table(rpb, qs)
    found = bands(layout, count)
    if count == 1:
        mask = _mask(found[0], table, qs)
        got = fused(gs, qs, ks, vs, outs, norm, 0.0, False, attn_mask=mask, scale=scale)
        return _back(got[0], q.shape), _back(got[1], q.shape), _back(got[2], q.shape)
    like = torch.contiguous_format
    grads = [torch.empty_like(q, memory_format=like)]
    grads += [torch.zeros_like(q, memory_format=like) for _ in "kv"]
    grad_q, grad_k, grad_v = (heads_first(t) for t in grads)
    for band in found:
        rows, keys = slice(band.start, band.end), slice(band.first, band.last)
        one = gs[:, :, rows], qs[:, :, rows], ks[:, :, keys], vs[:, :, keys], outs[:, :, rows]
        mask = _mask(band, table, qs)
        parts = fused(*one, norm[:, :, rows], 0.0, False, attn_mask=mask, scale=scale)
        grad_q[:, :, rows] = parts[0]
        grad_k[:, :, keys] += parts[1]
        grad_v[:, :, keys] += parts[2]
    return grads[0], grads[1], grads[2]


@lru_cache(maxsize=16)
def alone(
    shape: tuple[int, ...], kernel_size: tuple[int, ...], stride: tuple[int, ...],
    dilation: tuple[int, ...], is_causal: tuple[bool, ...], grad: bool,
) -> tuple[Band, Layout | None] | None:  # fmt: skip
    """The band of :func:`attend`, where one is the cheapest way, and what it is to take apart."""
    found = axes.layout(shape, kernel_size, stride, dilation, is_causal)
    inner = whole_groups.covered(found)
    if 0 in shape or chosen(inner or found, shape[0], shape[-2], False, grad) != 1:
        return None
    return bands(inner or found, 1)[0], None if inner is None else found


def attend(
    q: Tensor, k: Tensor, v: Tensor, band: Band, layout: Layout | None, scale: float
) -> Tensor:
    """One band as one call of SDPA, which differentiates itself -> [B, *space, H, D].

    With ``layout`` its dilation groups are the pictures.
    """
    if layout is not None:
        q, k, v = (whole_groups.apart(t, layout) for t in (q, k, v))
    qs, ks, vs = (t.flatten(1, -3).transpose(1, 2) for t in (q, k, v))
    mask = _mask(band, None, q)
    out = torch.nn.functional.scaled_dot_product_attention(qs, ks, vs, mask, scale=scale)
    out = out.transpose(1, 2).reshape(q.shape)
    return out if layout is None else whole_groups.together(out, layout)
