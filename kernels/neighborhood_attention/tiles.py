# SPDX-License-Identifier: Apache-2.0
"""Tiles of queries, the halos of keys around them, and the way back.

A layer of attention asks for the same cut again and again and is short on small images, so all
that depends on shapes alone (which tiles, where in memory) is remembered; the tables are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .axis import Layout, Span, product, runs

MAX_HELD = 1 << 19  # numbers in a buffer of a part: fp32 2 MiB, about the cache of a core
# By number of axes: queries per tile on an axis, and the length from which an axis counts as long.
TARGETS = {1: (32, 128), 2: (4, 48), 3: (3, 16)}

Ranges = tuple[tuple[int, int], ...]
View = tuple[tuple[int, ...], tuple[int, ...], int]


class Scratch:
    """The buffers of one part after another, in one allocation.

    Buffers of their own are given back to the system when a call ends, and every page of them is
    made anew in the next one: a third of a forward over 56 x 56 tokens.

    Args:
        numbers: that the largest part takes.
        dtype: of all buffers.
        device: where they are.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(numbers, dtype=dtype, device=device)
        self._used = 0

    def begin(self) -> None:
        """A new part: what was taken before may be overwritten."""
        self._used = 0

    def take(self, shape: Sequence[int]) -> Tensor:
        """A buffer, not initialised. What does not fit is allocated."""
        count = product(shape)
        start, self._used = self._used, self._used + -(-count // 16) * 16
        if self._used > len(self._flat):
            return self._flat.new_empty(tuple(shape))
        return self._flat[start : start + count].view(tuple(shape))


@dataclass(frozen=True, eq=False)
class Part:
    """Some images and some tiles: what one round of matrix products works on.

    Attributes:
        runs: one for each axis.
        images: (lo, hi).
        tiles: (lo, hi) for each axis.
        heads: H.
    """

    runs: tuple[Span, ...]
    images: tuple[int, int]
    tiles: Ranges
    heads: int

    @cached_property
    def tile(self) -> int:
        """Queries per tile."""
        return product(run.tile for run in self.runs)

    @cached_property
    def span(self) -> int:
        """Keys per tile."""
        return product(run.span for run in self.runs)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """[tiles of each axis, images, groups of each axis, H]."""
        counts = (hi - lo for lo, hi in self.tiles)
        images = self.images[1] - self.images[0]
        return (*counts, images, *(run.groups for run in self.runs), self.heads)

    @cached_property
    def count(self) -> int:
        """Tiles."""
        return product(self.shape[: len(self.runs)])

    @cached_property
    def cells(self) -> tuple[tuple[tuple[int, ...], Ranges], ...]:
        """The part cut by class: the class on each axis, and where its tiles are in this part."""
        return tuple(_cuts(self, [[(*c, i) for i, c in enumerate(r.classes)] for r in self.runs]))

    @cached_property
    def pieces(self) -> tuple[tuple[tuple[int, ...], Ranges], ...]:
        """The part cut where spans are not evenly apart: distance on each axis, and where."""
        return tuple(_cuts(self, [r.pieces for r in self.runs]))

    @cached_property
    def cells_of_heads(self) -> int:
        """Tiles of all images, groups and heads."""
        return product(self.shape)

    def queries(self, t: Tensor, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        """The tiles of ``t`` [B, *space, H, D] -> [tiles, images * groups * H, tile, D]."""
        size, strides, offset = _query_view(self, t.stride(), t.shape[-1])
        view = t.as_strided(size, strides, t.storage_offset() + offset)
        copy = _room(size, dtype, t.device, scratch).copy_(view)
        return copy.view(self.count, -1, self.tile, t.shape[-1])

    def keys(self, t: Tensor, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
        """The halos of ``t`` [B, *space, H, D] -> [tiles, images * groups * H, span, D]."""
        size = (*self.shape, *(run.span for run in self.runs), t.shape[-1])
        out = _room(size, dtype, t.device, scratch)
        at = t.storage_offset()
        for slices, (inner, strides, offset) in _key_views(self, t.stride(), t.shape[-1]):
            out[slices].copy_(t.as_strided(inner, strides, at + offset))
        return out.view(self.count, -1, self.span, t.shape[-1])

    def store(self, out: Tensor, tiles: Tensor) -> None:
        """Write the result of the tiles, [tiles, .., tile, D], to its place in ``out``."""
        size, strides, offset = _query_view(self, out.stride(), out.shape[-1])
        out.as_strided(size, strides, out.storage_offset() + offset).copy_(tiles.view(size))

    def fold(self, outs: Sequence[Tensor], halos: Tensor) -> None:
        """Add what each tile holds for its keys, [x, tiles, .., span, D], to the x ``outs``.

        Axis by axis, tile by tile: the order of the sums is fixed.
        """
        rank, out = len(self.runs), outs[0]
        halos = halos.view(len(outs), *self.shape, *(r.span for r in self.runs), out.shape[-1])
        at = self.images[0] * out.stride(0)
        for axis in reversed(range(1, rank)):
            run, (lo, hi) = self.runs[axis], self.tiles[axis]
            starts = run.starts[lo:hi]
            at += (run.group + run.step * starts[0]) * out.stride(1 + axis)
            if hi - lo == 1:
                halos = halos.select(1 + axis, 0)
                continue
            dim = halos.ndim - 2 - rank + axis  # of the span, once the tiles are gone
            size = [*halos.shape[: 1 + axis], *halos.shape[2 + axis :]]
            size[dim] = starts[-1] + run.span - starts[0]
            whole = halos.new_zeros(size)
            for start, part in zip(starts, halos.unbind(1 + axis), strict=True):
                whole.narrow(dim, start - starts[0], run.span).add_(part)
            halos = whole
        space = out.stride()[1:-2]
        last = [run.step * stride for run, stride in zip(self.runs, space, strict=True)]
        strides = (out.stride(0), *space, out.stride(-2), *last, out.stride(-1))
        run, (lo, hi) = self.runs[0], self.tiles[0]
        for t, tiles in zip(outs, halos, strict=True):
            for start, part in zip(run.starts[lo:hi], tiles, strict=True):
                first = at + (run.group + run.step * start) * out.stride(1)
                t.as_strided(part.shape, strides, t.storage_offset() + first).add_(part)

    def by_class(self, table: Tensor, out: Tensor | None = None) -> Tensor:
        """Spread [*classes, x, a, b] over the tiles -> [tiles, 1, a, b].

        With x = H over images, groups and heads too: [tiles, images * groups * H, a, b], which
        ``out`` may be.
        """
        rank = len(self.runs)
        shared = table.shape[rank] == 1 and out is None
        lead = self.shape[:rank] if shared else self.shape
        size = (*lead, *table.shape[-2:])
        out = table.new_empty(size) if out is None else out.view(size)
        for where, tiles in self.cells:
            out[_slices(tiles)] = table[where][0] if shared else table[where]
        return out.view(self.count, -1, *table.shape[-2:])

    def mask(self, like: Tensor) -> Tensor:
        """0 for a neighbour, -inf for none: [tiles, 1, tile, span]. Not to be written to."""
        return _mask(self.runs, self.cells, like.dtype, like.device)

    def add_by_class(self, sums: Tensor, tiles: Tensor) -> None:
        """Add [tiles, .., a, b] over tiles, images and groups into ``sums`` [*classes, H, a, b]."""
        tiles = tiles.view(*self.shape, *tiles.shape[-2:])
        for where, cell in self.cells:
            sums[where] += tiles[_slices(cell)].sum(tuple(range(tiles.ndim - 3)))


def _room(
    size: Sequence[int], dtype: torch.dtype, device: torch.device, scratch: Scratch | None
) -> Tensor:
    if scratch is None:
        return torch.empty(size, dtype=dtype, device=device)
    return scratch.take(size)


def _slices(ranges: Ranges) -> tuple[slice, ...]:
    return tuple(slice(lo, hi) for lo, hi in ranges)


def _cuts(
    part: Part, per_axis: Sequence[Sequence[tuple[int, int, int]]]
) -> Iterator[tuple[tuple[int, ...], Ranges]]:
    """Products of the rows (lo, hi, value) of each axis -> values, ranges counted in the part."""
    kept = []
    for rows, (lo, hi) in zip(per_axis, part.tiles, strict=True):
        cut = [(max(a, lo) - lo, min(b, hi) - lo, value) for a, b, value in rows]
        kept.append([row for row in cut if row[0] < row[1]])
    for chosen in itertools.product(*kept):
        yield tuple(value for _, _, value in chosen), tuple((a, b) for a, b, _ in chosen)


@lru_cache(maxsize=4096)
def _query_view(part: Part, strides: tuple[int, ...], dim: int) -> View:
    """Size, strides and offset of the tiles in a tensor [B, *space, H, D] with these strides."""
    offset = part.images[0] * strides[0]
    lead, last = [], []
    for run, (lo, _), stride in zip(part.runs, part.tiles, strides[1:-2], strict=True):
        offset += (run.group + run.step * (run.first + lo * run.tile)) * stride
        lead.append(run.tile * run.step * stride)
        last.append(run.step * stride)
    steps = (*lead, strides[0], *strides[1:-2], strides[-2], *last, strides[-1])
    return (*part.shape, *(run.tile for run in part.runs), dim), steps, offset


@lru_cache(maxsize=4096)
def _key_views(
    part: Part, strides: tuple[int, ...], dim: int
) -> list[tuple[tuple[slice, ...], View]]:
    """The same of the halos, piece by piece; halos overlap."""
    rank, found = len(part.runs), []
    last = [r.step * stride for r, stride in zip(part.runs, strides[1:-2], strict=True)]
    for apart, ranges in part.pieces:
        offset = part.images[0] * strides[0]
        for run, (lo, _), (a, _), stride in zip(
            part.runs, part.tiles, ranges, strides[1:-2], strict=True
        ):
            offset += (run.group + run.step * run.starts[lo + a]) * stride
        lead = [gap * step for gap, step in zip(apart, last, strict=True)]
        counts = [hi - lo for lo, hi in ranges]
        size = (*counts, *part.shape[rank:], *(run.span for run in part.runs), dim)
        steps = (*lead, strides[0], *strides[1:-2], strides[-2], *last, strides[-1])
        found.append((_slices(ranges), (size, steps, offset)))
    return found


def choices(layout: Layout) -> Iterator[tuple[Span, ...]]:
    """All choices of one run of tiles for each axis."""
    return itertools.product(*(runs(axis, *TARGETS[len(layout)]) for axis in layout))


@lru_cache(maxsize=128)
def plan(
    layout: Layout, batch: int, heads: int, dim: int, held: int
) -> tuple[tuple[tuple[Span, ...], tuple[Part, ...]], ...]:
    """All work on [B, *space, H, D]: for each choice of runs its parts.

    A part is as many rows of tiles, and images, as keep its buffers below ``held`` numbers.
    """
    found = []
    for chosen in choices(layout):
        counts = [len(run.starts) for run in chosen]
        tile, span = (product(getattr(r, x) for r in chosen) for x in ("tile", "span"))
        row = heads * span * max(tile, dim) * product(r.groups for r in chosen)
        row *= product(counts[1:])  # of one image
        images = max(1, min(batch, held // row))
        rows = max(1, min(counts[0], held // (row * images)))
        rest = tuple((0, count) for count in counts[1:])
        parts = [
            Part(chosen, (b, min(b + images, batch)), ((r, min(r + rows, counts[0])), *rest), heads)
            for b in range(0, batch, images)
            for r in range(0, counts[0], rows)
        ]
        found.append((chosen, tuple(parts)))
    return tuple(found)


def interleave(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Combine [c, a, b] of each axis by ``i * size + j`` -> [*c, product(a), product(b)]."""
    rank, total = len(tables), None
    for axis, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        shape = [1] * (3 * rank)
        shape[axis], shape[rank + axis], shape[2 * rank + axis] = table.shape
        table = table.view(shape)
        total = table if total is None else total * size + table
    assert total is not None
    return total.flatten(2 * rank).flatten(rank, -2)


@lru_cache(maxsize=8)
def _mask(
    chosen: tuple[Span, ...],
    cuts: tuple[tuple[tuple[int, ...], Ranges], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """The mask of every part with these classes at these tiles; at most 8 x ``MAX_HELD`` numbers.

    Written anew for each call it is a quarter of all memory traffic.
    """
    table = interleave([run.mask for run in chosen], [1] * len(chosen)).to(device, dtype)
    counts = [max(tiles[axis][1] for _, tiles in cuts) for axis in range(len(chosen))]
    out = table.new_empty(*counts, *table.shape[-2:])
    for where, tiles in cuts:
        out[_slices(tiles)] = table[where]
    return out.view(-1, 1, *table.shape[-2:])


@lru_cache(maxsize=32)
def bias_index(chosen: tuple[Span, ...]) -> Tensor:
    """Entry of every pair in a bias table of 2 k numbers per axis, [*classes, tile, span].

    The last number of an axis stands for "no neighbour".
    """
    return interleave([run.offsets for run in chosen], [2 * run.near.shape[-1] for run in chosen])


def bias_table(rpb: Tensor, like: Tensor) -> Tensor:
    """[H, 2 k - 1, ...] -> [H, product(2 k)]; the last number of an axis, "no neighbour", -inf."""
    table = rpb.new_full((len(rpb), *(n + 1 for n in rpb.shape[1:])), -torch.inf, dtype=like.dtype)
    table[(slice(None), *(slice(n) for n in rpb.shape[1:]))] = rpb
    return table.flatten(1)


def bias(chosen: tuple[Span, ...], rpb: Tensor, like: Tensor) -> Tensor:
    """What is added to the scores, by class: [*classes, H, tile, span]; -inf: no neighbour."""
    index = bias_index(chosen).to(like.device)
    found = bias_table(rpb, like).index_select(1, index.flatten())
    found = found.view(len(rpb), *index.shape)
    return found.movedim(0, len(chosen))


def add_by_index(total: Tensor, index: Tensor, sums: Tensor) -> None:
    """``total`` [H, bins] += ``sums`` [*classes, H, a, b] at ``index`` [*classes, a, b].

    One flat index: PyTorch's CPU kernel goes row by row through anything else, 20 times slower.
    """
    heads, bins = total.shape
    first = torch.arange(heads, device=total.device) * bins
    at = index.to(total.device).unsqueeze(-3) + first[:, None, None]
    if total.is_cuda:  # sorted first: atomic additions would have no order
        total.view(-1).index_put_((at.flatten(),), sums.flatten(), accumulate=True)
    else:
        total.view(-1).index_add_(0, at.flatten(), sums.flatten())


def unpadded(table: Tensor, layout: Layout) -> Tensor:
    """[H, product(2 k)] -> [H, 2 k - 1, ...]."""
    table = table.view(-1, *(2 * a.kernel for a in layout))
    return table[(slice(None), *(slice(2 * a.kernel - 1) for a in layout))].contiguous()


@lru_cache(maxsize=32)
def near(chosen: tuple[Span, ...]) -> tuple[Tensor, Tensor]:
    """Where in the span each neighbour is, [*classes, tile, K], and which of them exist."""
    found = interleave([run.near.clamp_min(0) for run in chosen], [run.span for run in chosen])
    none = interleave([(run.near < 0).long() for run in chosen], [1] * len(chosen))
    return found, none == 0
