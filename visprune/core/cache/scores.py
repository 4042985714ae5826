# SPDX-License-Identifier: Apache-2.0
"""Scores that several papers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visprune.core.cache.parts import Score
from visprune.core.cache.seen import CacheSeen, Group


@dataclass(frozen=True)
class WindowAttention(Score):
    """What the last queries of the prompt give to each slot, smoothed over those that may leave.

    Attributes:
        window: observers.
        kernel: of the smoothing, odd; 1: none.
        pool: average (divided by the kernel at the ends too) or maximum.
        rows: sum or mean over the observers.
        group: over the query heads of a key head.
        heads: of every layer, its query heads that count; then one score for all key heads.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    rows: Literal["sum", "mean"] = "sum"
    group: Group = "mean"
    heads: tuple[tuple[int, ...], ...] | None = None

    def read(self, seen: CacheSeen) -> Tensor:
        """Rows of the window, pooled."""
        rows = seen.rows(seen.window(self.window))
        score = rows.sum(1) if self.rows == "sum" else rows.mean(1)
        if self.heads is None:
            return smoothed(seen.grouped(score, self.group), seen.free, self.kernel, self.pool)
        chosen = score[list(self.heads[seen.layer])]
        return smoothed(chosen, seen.free, self.kernel, self.pool).mean(0, keepdim=True)


@dataclass(frozen=True)
class ColumnSums(Score):
    """What the slots receive from many queries.

    Attributes:
        window: the last observers alone; ``None``: the whole prompt.
        group: over the query heads of a key head; ``"all"``: one score for the layer, their mean.
    """

    window: int | None = None
    group: Literal["mean", "max", "sum", "all"] = "sum"

    def read(self, seen: CacheSeen) -> Tensor:
        """Column sums."""
        sums = seen.columns(None if self.window is None else seen.window(self.window))
        if self.group == "all":
            return sums.mean(0, keepdim=True)
        return seen.grouped(sums, self.group)


@dataclass(frozen=True)
class LastRow(Score):
    """What the last query of the prompt gives to each slot, mean of all heads."""

    def read(self, seen: CacheSeen) -> Tensor:
        """One row."""
        return seen.rows(seen.queries[-1:])[:, 0].mean(0, keepdim=True)


@dataclass(frozen=True)
class KeyNorm(Score):
    """Small keys first: they are attended to most (arXiv:2406.11430)."""

    def read(self, seen: CacheSeen) -> Tensor:
        """The norm, negative."""
        return -seen.key.float().norm(dim=-1)


@dataclass(frozen=True)
class Recency(Score):
    """Late slots, and the first ones.

    Attributes:
        sinks: how many of the first that may leave come before all others.
    """

    sinks: int = 0

    def read(self, seen: CacheSeen) -> Tensor:
        """The place."""
        place = torch.arange(seen.length, device=seen.key.device, dtype=torch.float32)
        first = seen.free & (seen.free.cumsum(0) <= self.sinks)
        return torch.where(first, seen.length + 1.0, place)[None]


def smoothed(score: Tensor, free: Tensor, kernel: int, pool: str) -> Tensor:
    """Pool ``[..., L]`` over the slots that may leave, as if these stood in a row."""
    if kernel == 1:
        return score
    part = score[:, free]
    if not part.shape[1]:
        return score
    half = kernel // 2
    if pool == "avg":
        part = torch.nn.functional.avg_pool1d(part, kernel, stride=1, padding=half)
    else:
        part = torch.nn.functional.max_pool1d(part, kernel, stride=1, padding=half)
    out = score.clone()
    out[:, free] = part
    return out
