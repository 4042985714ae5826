# SPDX-License-Identifier: Apache-2.0
"""Scores that several papers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.cache.parts import Score
from visprune.core.cache.seen import CacheSeen, Group
from visprune.errors import ConfigError


@dataclass(frozen=True)
class WindowAttention(Score):
    """What the last queries of the prompt give to each slot, smoothed over those that may leave.

    Attributes:
        window: observers.
        kernel: of the smoothing, odd; 1: none.
        pool: average (divided by the kernel at the ends too) or maximum.
        rows: sum or mean over the observers.
        group: over the query heads of a key head; ``"all"``: one score for the layer, the mean of
            its heads.
        heads: with ``"all"``, of every layer the query heads that count.
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    rows: Literal["sum", "mean"] = "sum"
    group: Group | Literal["all"] = "mean"
    heads: tuple[tuple[int, ...], ...] | None = None

    def read(self, seen: CacheSeen) -> Tensor:
        """Rows of the window, pooled."""
        rows = seen.rows(seen.window(self.window))
        score = rows.sum(1) if self.rows == "sum" else rows.mean(1)
        if self.group != "all":
            return smoothed(seen.grouped(score, self.group), seen.free, self.kernel, self.pool)
        chosen = score if self.heads is None else score[list(self.heads[seen.layer])]
        return smoothed(chosen, seen.free, self.kernel, self.pool).mean(0, keepdim=True)


@dataclass(frozen=True)
class ColumnSums(Score):
    """What the slots receive from many queries.

    Attributes:
        rows: the whole ``"prompt"``, the text ``"behind"`` the last picture, or that many of the
            last observers.
        group: over the query heads of a key head; ``"all"``: one score for the layer, their mean.
        sinks: how many of the first that may leave come before all others.
    """

    running: ClassVar[bool] = True

    rows: int | Literal["prompt", "behind"] = "prompt"
    group: Literal["mean", "max", "sum", "all"] = "sum"
    sinks: int = 0

    def read(self, seen: CacheSeen) -> Tensor:
        """Column sums, with those of before."""
        at = None
        if self.rows != "prompt":
            at = seen.behind() if self.rows == "behind" else seen.window(self.rows)
        sums = seen.columns(at)
        if self.group == "all":
            score = sums.mean(0, keepdim=True)
        else:
            score = seen.grouped(sums, self.group)
        if seen.carried is not None:
            score = score + seen.carried
        first = seen.free & (seen.free.cumsum(0) <= self.sinks)
        return score.masked_fill(first, torch.inf)


@dataclass(frozen=True)
class ProbeSums(Score):
    """What the slots receive from a few rows, by how many of these see them.

    Attributes:
        share: of the prompt's rows, the last ones, and as many earlier ones drawn at random; 1:
            all.
        seed: of the draw.
        group: over the query heads of a key head; ``"all"``: one score for the layer, their mean.
        rows: the rows themselves, in place of a draw.
        over: divide by the probes that see a slot, or by all rows that do.
    """

    share: float = 0.05
    seed: int = 0
    group: Literal["sum", "all"] = "all"
    rows: tuple[int, ...] | None = None
    over: Literal["probes", "all"] = "probes"

    def at(self, seen: CacheSeen) -> Tensor:
        """Numbers of the probes."""
        whole = seen.queries
        if self.rows is not None:
            return torch.tensor(self.rows, device=whole.device)
        count = len(whole)
        last = int(count - self.share * count)
        made = torch.Generator().manual_seed(self.seed * 7919 + seen.layer)
        drawn = torch.randperm(last, generator=made)[: int(self.share * count)].sort().values
        return torch.cat([drawn.to(whole.device), whole[last:]])

    def sums(self, seen: CacheSeen) -> Tensor:
        """What the probes give, mean of heads, ``[L]``."""
        return seen.columns(self.at(seen)).mean(0)

    def read(self, seen: CacheSeen) -> Tensor:
        """Divided."""
        at = self.at(seen)
        sums = seen.columns(at)
        score = sums.mean(0, keepdim=True) if self.group == "all" else seen.grouped(sums, "sum")
        steps = torch.arange(seen.length, device=at.device)
        if self.over == "all":
            seers = (seen.length - steps).clamp(min=1)
        else:
            seers = ((at + seen.stored)[:, None] >= steps).sum(0).clamp(min=1)
        return score / seers


@dataclass(frozen=True)
class LastRow(Score):
    """What the last query of the prompt gives to each slot, mean of all heads."""

    def read(self, seen: CacheSeen) -> Tensor:
        """One row."""
        return seen.rows(seen.queries[-1:])[:, 0].mean(0, keepdim=True)


@dataclass(frozen=True)
class LearnedScore(Score):
    """What the method's own module of a layer says of its keys and values."""

    def read(self, seen: CacheSeen) -> Tensor:
        """``[Hk, L]``."""
        if seen.learned is None:
            raise ConfigError(
                f"There is no module to score the slots of decoder layer {seen.layer} with; "
                f"build_learned of the method makes a ModuleList with one for each layer."
            )
        weights = sum(p.numel() for p in seen.learned.parameters())
        seen.spent += seen.length * weights
        scored: Tensor = seen.learned(seen.key, seen.value)
        return scored.float()


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
