# SPDX-License-Identifier: Apache-2.0
"""Control: average pooling on a coarser grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)


@dataclass(frozen=True, kw_only=True)
class Pool(BudgetedMethod):
    """Averages cells of the largest grid within the budget that has about the picture's aspect.

    A picture of h x w patches becomes one of h' x w' cells, ``h' w' <= num_keep``, each the mean of
    its patches; the cell's position is that of the patch nearest to its centre. The count can lie
    below the budget: the trace has the number. A video is pooled frame by frame, or over equal
    spans of frames where the budget has less than one token per frame; a tiled picture is pooled
    region by region, in proportion to the regions' tokens.
    """

    name: ClassVar[str] = "pool"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Pool each picture; the pictures of one group have the same grid."""
        index, dest, weight = pool_tokens(tokens.pos[0].cpu(), ctx.num_keep, tokens.kind)
        batch, device = len(tokens.features), tokens.features.device
        return Selection.assign(
            index.to(device).expand(batch, -1),
            dest.to(device).expand(batch, -1),
            weight.to(device).expand(batch, -1),
        )

    def survivors(self, places: Sequence[tuple[int, int, int]], keep: int, kind: str) -> int:
        """Cells of the grid."""
        return len(pool_tokens(torch.tensor(places), keep, kind)[0])


def pool_tokens(pos: Tensor, budget: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pool one picture.

    Args:
        pos: (t, h, w) of its patches, ``[N, 3]``.
        budget: most cells.
        kind: ``"image"`` (``t`` is a region) or ``"video"`` (``t`` is a frame).

    Returns:
        index ``[K]``, dest ``[N]`` and weight ``[N]`` of a :class:`Selection`.
    """
    cell = torch.full((len(pos),), -1, dtype=torch.int64)
    if kind == "video":
        frames, height, width = (pos.amax(0) + 1).tolist()
        spans = min(frames, budget)
        rows, columns = best_grid(height, width, budget // spans)
        cell = _cells(pos, (frames, height, width), (spans, rows, columns))
    else:
        used = 0
        for part, share in _regions(pos, budget):
            extent = (pos[part] - pos[part].amin(0)).amax(0) + 1
            rows, columns = best_grid(int(extent[1]), int(extent[2]), share)
            local = pos[part] - pos[part].amin(0)
            cell[part] = used + _cells(local, tuple(extent.tolist()), (1, rows, columns))
            used += rows * columns
    count = torch.zeros(int(cell.max()) + 1).index_add_(
        0, cell[cell >= 0], torch.ones(int((cell >= 0).sum()))
    )
    weight = torch.where(cell >= 0, 1.0 / count[cell.clamp(min=0)], 0.0)
    return _centres(pos, cell, len(count)), cell, weight


def best_grid(height: int, width: int, budget: int) -> tuple[int, int]:
    """The largest grid of at most ``budget`` cells with about the aspect of ``height x width``.

    "About": the ratio of the sides within a factor of 1.25; if no such grid fits, the nearest
    aspect among the largest. Never finer than the patches.
    """
    found = []
    for rows in range(1, min(height, budget) + 1):
        for columns in range(1, min(width, budget // rows) + 1):
            off = abs(math.log((columns / rows) / (width / height)))
            found.append((off <= math.log(1.25), rows * columns, -off, rows, columns))
    return max(found)[3:]


def _regions(pos: Tensor, budget: int) -> list[tuple[Tensor, int]]:
    """(patches, share of the budget) of every region; a budget of one is the first region's."""
    regions = [(pos[:, 0] == t).nonzero()[:, 0] for t in pos[:, 0].unique().tolist()]
    if budget < len(regions):
        return [(regions[0], budget)]
    shares = [max(1, budget * len(part) // len(pos)) for part in regions]
    shares[-1] = budget - sum(shares[:-1])
    return list(zip(regions, shares, strict=True))


def _cells(pos: Tensor, extent: tuple[int, ...], cells: tuple[int, int, int]) -> Tensor:
    """The raster number of the cell that each patch falls into."""
    t, h, w = (pos[:, axis] * cells[axis] // extent[axis] for axis in range(3))
    return (t * cells[1] + h) * cells[2] + w


def _centres(pos: Tensor, cell: Tensor, count: int) -> Tensor:
    """The patch nearest to the middle of each cell; ties go to the lower index."""
    inside = cell >= 0
    places, slots = pos[inside].double(), cell[inside]
    size = torch.zeros(count, 1, dtype=torch.float64).index_add_(
        0, slots, torch.ones(len(slots), 1).double()
    )
    middle = torch.zeros(count, 3, dtype=torch.float64).index_add_(0, slots, places) / size
    distance = (places - middle[slots]).square().sum(1)
    order = distance.argsort(stable=True)
    order = order[slots[order].argsort(stable=True)]
    first = torch.searchsorted(slots[order], torch.arange(count))
    return inside.nonzero()[:, 0][order[first]]
