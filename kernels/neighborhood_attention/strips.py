# SPDX-License-Identifier: Apache-2.0
"""PyTorch path of pictures of a middle size: strips of two rows, many in one call of SDPA.

Keys of neighbouring strips are at equal distances in memory: a view with overlapping rows is a
batch of them, nothing is copied, strips that lie alike share one mask, and all are one parallel
region. Tiles compute fewer scores and open some ten regions for every part; where other programs
want the cores, each of these waits for a time slice.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import bands
from .axis import Layout

ROWS = 2  # of a strip
CLOSE = 1.1  # taken up to this factor of the cost of tiles, for what tiles lose on a busy machine


@dataclass(frozen=True, eq=False)
class Strips:
    """Strips one after another, whose keys are at equal distances.

    Attributes:
        count: how many.
        start: first row of the first one's queries; each begins ``rows`` behind the one before.
        rows: rows of queries of each.
        first: first row of the first one's keys.
        step: rows between the keys of one and of the next.
        span: rows of keys of each.
        mask: fp32 [1 or count, 1, queries, keys], 0 for a neighbour, else -inf.
    """

    count: int
    start: int
    rows: int
    first: int
    step: int
    span: int
    mask: Tensor


@lru_cache(maxsize=64)
def price(layout: Layout, batch: int, heads: int) -> float | None:
    """What the path costs, in scores of a tile; ``None`` where it cannot be taken."""
    if len(layout) != 2 or layout[0].length < 2 * ROWS:
        return None
    width = layout[1].length
    found = _groups(layout)
    held = sum(masks * rows * span for _, _, rows, _, _, span, masks in found) * width**2
    if held > bands.MAX_MASK:
        return None
    scores = sum(count * rows * span for count, _, rows, _, _, span, _ in found) * width**2
    places = layout[0].length * width
    each = bands.FUSED * scores + bands.ROW * places
    return bands.MASKED * batch * heads * each + bands.BAND * batch * len(found)


@lru_cache(maxsize=64)
def _groups(layout: Layout) -> tuple[tuple[int, int, int, int, int, int, int], ...]:
    """Of each group: strips, first row of queries, rows, first row of keys, its step, rows, masks.

    Strips of a group have keys at equal distances: 0 at a border, where windows stay, else as their
    queries.
    """
    axis = layout[0]
    inside = bands._offsets(axis)
    groups: list[list[tuple[int, int, int, int]]] = []
    for cut in bands._rows(axis, axis.length // ROWS):
        if groups and _joins(groups[-1], cut):
            groups[-1].append(cut)
        else:
            groups.append([cut])
    found = []
    for group in groups:
        start, end, first, last = group[0]
        step = group[1][2] - first if len(group) > 1 else 0
        looks = [inside[a:b, c:d] for a, b, c, d in group]
        masks = 1 if all(torch.equal(looks[0], look) for look in looks) else len(group)
        found.append((len(group), start, end - start, first, step, last - first, masks))
    return tuple(found)


def _joins(group: list[tuple[int, int, int, int]], cut: tuple[int, int, int, int]) -> bool:
    """Whether a strip goes on as those of a group do."""
    before = group[-1]
    same = cut[1] - cut[0] == before[1] - before[0] and cut[3] - cut[2] == before[3] - before[2]
    step = cut[2] - before[2]
    if len(group) > 1:
        return same and step == before[2] - group[-2][2]
    return same and step in (0, cut[0] - before[0])


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is remembered must serve under autograd too
def strips(layout: Layout) -> tuple[Strips, ...]:
    """The strips of a picture, by groups."""
    down, across = (bands._offsets(axis) == 2 * axis.kernel - 1 for axis in layout)
    width, found = layout[1].length, []
    for count, start, rows, first, step, span, masks in _groups(layout):
        each = []
        for n in range(masks):
            at, keys = start + n * rows, first + n * step
            outside = down[at : at + rows, keys : keys + span]
            each.append(outside[:, None, :, None] | across[None, :, None, :])
        hidden = torch.stack(each).reshape(masks, 1, rows * width, span * width)
        mask = torch.zeros(hidden.shape, device="cpu").masked_fill_(hidden, -torch.inf)
        found.append(Strips(count, start, rows, first, step, span, mask))
    return tuple(found)


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, Y, X, H, D] and LSE [B, Y, X, H], both in fp32 (or fp64)."""
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    if q.dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    batch, _, width, heads, dim = q.shape
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])

    def view(t: Tensor, many: tuple[int, int, int, int], wide: int) -> Tensor:
        count, step, first, rows = many
        size, one = (count, heads, rows * width, wide), heads * wide
        strides = (step * width * one, wide, one, 1)
        return t.as_strided(size, strides, t.storage_offset() + first * width * one)

    for image, part in itertools.product(range(batch), strips(layout)):
        queries = (part.count, part.rows, part.start, part.rows)
        keys = (part.count, part.step, part.first, part.span)
        given = view(q[image], queries, dim), view(k[image], keys, dim), view(v[image], keys, dim)
        got, norm = fused(*given, attn_mask=part.mask.to(q.dtype), scale=scale)
        view(out[image], queries, dim).copy_(got)
        view(lse[image], queries, 1)[..., 0].copy_(norm)
    return out, lse
