# SPDX-License-Identifier: Apache-2.0
"""The index rule of one axis in closed form, and how its queries are cut into tiles.

Places count inside a dilation group: position = group + dilation * place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def product(values: Iterable[int]) -> int:
    """Product of integers, 1 for none."""
    return math.prod(values)


@dataclass(frozen=True)
class Axis:
    """One axis: its length and the window parameters."""

    length: int
    kernel: int
    stride: int
    dilation: int
    causal: bool

    def window(self, place: int, count: int) -> tuple[int, int]:
        """(first, end) of the query at ``place`` in a dilation group of ``count``."""
        first = place - place % self.stride
        if self.causal:
            lead = min(first + self.stride - 1, count - 1)
            return max(lead - self.kernel + 1, 0), place + 1
        lead = min(first + self.stride // 2, count - 1)
        start = min(max(lead - self.kernel // 2, 0), count - self.kernel)
        return start, start + self.kernel

    def groups(self) -> list[tuple[int, int, int]]:
        """(first group, groups, places in each): one row, or two where d does not divide L."""
        short, longer = divmod(self.length, self.dilation)
        rows = [(0, longer, short + 1), (longer, self.dilation - longer, short)]
        return [row for row in rows if row[1] > 0 and row[2] > 0]


Layout = tuple[Axis, ...]


def layout(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Layout:
    """The axes of a tensor [B, *space, H, D]."""
    per_axis = zip(shape[1:-2], kernel_size, stride, dilation, is_causal, strict=True)
    return tuple(Axis(n, k, s, d, bool(causal)) for n, k, s, d, causal in per_axis)


@lru_cache(maxsize=256)
def pairs(length: int, kernel: int, stride: int, dilation: int, causal: bool) -> int:
    """Pairs of a query and a neighbour along one axis."""
    axis = Axis(length, kernel, stride, dilation, causal)
    total = 0
    for _, groups, count in axis.groups():
        windows = (axis.window(place, count) for place in range(count))
        total += groups * sum(end - start for start, end in windows)
    return total


@dataclass(frozen=True, eq=False)
class Span:
    """Equal tiles of consecutive queries, in dilation groups of one length.

    Attributes:
        group: first dilation group; ``groups`` of them follow each other.
        step: the dilation.
        first: place of the first query.
        tile: queries per tile.
        span: keys per tile.
        starts: place of the first key of every tile.
        pieces: (lo, hi, distance) ranges of tiles whose starts are evenly apart.
        classes: (lo, hi) ranges of tiles whose windows lie alike in tile and span.
        offsets: int64 [classes, tile, span], bias index of every pair, 2 k - 1 for no neighbour.
        mask: fp32 [classes, tile, span], 0 for a neighbour, else -inf.
        near: int64 [classes, tile, k], where in the span each neighbour is; -1 for none.
    """

    group: int
    groups: int
    step: int
    first: int
    tile: int
    span: int
    starts: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]
    classes: tuple[tuple[int, int], ...]
    offsets: Tensor
    mask: Tensor
    near: Tensor


@lru_cache(maxsize=256)
def runs(axis: Axis, target: int, wide: int) -> tuple[Span, ...]:
    """Cut an axis into tiles of ``target`` to 2 ``target`` queries, equal ones if that can be.

    From ``wide`` places on small tiles are best, which waste the fewest scores; below it large
    ones, which are few. Tiles are whole strides where that is possible.
    Memory: a few classes of tile x span numbers; a pure function, so remembered.
    """
    found = []
    for group, groups, count in axis.groups():
        unit = axis.stride if axis.stride <= 2 * target else 1
        sizes = [n * unit for n in range(-(-target // unit), max(2 * target // unit, 1) + 1)]
        sizes = sizes if count >= wide else sizes[::-1]
        even = [n for n in sizes if count % n == 0]
        tile = min(count, (even or sizes)[0])
        whole = count // tile
        cuts = [(0, tile, whole)] if whole else []
        if count % tile:
            cuts.append((whole * tile, count % tile, 1))
        found += [_run(axis, group, groups, count, *cut) for cut in cuts]
    return tuple(found)


def _run(
    axis: Axis, group: int, groups: int, count: int, first: int, tile: int, tiles: int
) -> Span:
    windows = [axis.window(place, count) for place in range(first, first + tile * tiles)]
    parts = [windows[i * tile : (i + 1) * tile] for i in range(tiles)]
    lows = [min(start for start, _ in part) for part in parts]
    span = max(max(end for _, end in p) - low for p, low in zip(parts, lows, strict=True))
    starts = tuple(min(low, count - span) for low in lows)
    patterns: list[tuple[tuple[int, int, int], ...]] = []
    classes: list[tuple[int, int]] = []
    for i, (part, start) in enumerate(zip(parts, starts, strict=True)):
        begin = first + i * tile
        rows = tuple((a - start, b - start, start - begin - n) for n, (a, b) in enumerate(part))
        if not patterns or patterns[-1] != rows:
            patterns.append(rows)
            classes.append((i, i + 1))
        else:
            classes[-1] = (classes[-1][0], i + 1)
    pieces = [(0, 1, 0)]
    for i in range(1, tiles):
        lo, hi, apart = pieces[-1]
        gap = starts[i] - starts[i - 1]
        if hi - lo == 1 or gap == apart:
            pieces[-1] = (lo, i + 1, gap)
        else:
            pieces.append((i, i + 1, 0))
    table = torch.tensor(patterns, device="cpu")  # [classes, tile, 3]
    low, high, shift = table[..., 0:1], table[..., 1:2], table[..., 2:3]
    place, k = torch.arange(span, device="cpu"), axis.kernel
    inside = (place >= low) & (place < high)
    near = low + torch.arange(k, device="cpu")
    return Span(
        group, groups, axis.dilation, first, tile, span, starts, tuple(pieces), tuple(classes),
        (place + shift + k - 1).masked_fill(~inside, 2 * k - 1),
        torch.zeros(inside.shape, device="cpu").masked_fill(~inside, -math.inf),
        near.masked_fill(near >= high, -1),
    )  # fmt: skip
