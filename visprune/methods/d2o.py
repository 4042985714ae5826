# SPDX-License-Identifier: Apache-2.0
"""D2O: what is near enough merges, the rest is dropped (ICLR 2025, arXiv:2406.13035)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import ModelSpec
from visprune.core.cache import (
    CacheBudget,
    CacheMethod,
    CacheSeen,
    ColumnSums,
    Eviction,
    Looked,
    MergeNearest,
    Scope,
)


@dataclass(frozen=True)
class ByVariance(CacheBudget):
    """Layers whose column sums vary much keep less; the first two and the last keep all."""

    def read(self, seen: CacheSeen) -> Tensor:
        """The variance of the column sums over slots, scaled over heads, their mean."""
        spread = seen.columns().var(dim=1)
        low, high = spread.min(), spread.max()
        return ((spread - low) / (high - low + 1e-6)).mean()

    def ratios(self, variance: Tensor, mean: float) -> Tensor:
        """What each layer keeps of its slots, of ``[layers]`` and the mean."""
        return (torch.softmax(-variance, 0) * len(variance) * mean).clamp(0.01, 1.0)

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """A part of every layer's counted slots."""
        found = []
        counted = max(1, sum(x.counted for x in layers))
        mean = sum(x.keep + x.counted - x.num_free for x in layers) / counted
        ratios = self.ratios(torch.stack([x.budget for x in layers]).float(), mean).tolist()
        whole = (0, 1, layers[0].num_layers - 1)
        for looked, ratio in zip(layers, ratios, strict=True):
            count = int(ratio * looked.counted) - (looked.counted - looked.num_free)
            if looked.layer in whole or looked.keep >= looked.num_free:
                count = looked.num_free
            found.append(torch.full((looked.heads,), max(0, count)))
        return found


@dataclass(frozen=True, kw_only=True)
class D2O(CacheMethod):
    """Slots leave by their column sums, layers by their variance, and near ones merge.

    **Score**: column sums over the whole prompt. **Budget**: layers by ``softmax(-variance)`` of
    their column sums; layers 0, 1 and the last keep all, beyond the amount. **Action**: a dropped
    slot goes into the kept one with the nearest key, weighted by the cosine, if that (mean of
    heads) reaches the mean of all; else it is lost. **Scope**: with ``"prompt"``, as published, the
    last ``recent`` slots stay and count, and the first four rank highest.

    The official code cuts at the first decoded token, with its row among the sums, and goes on from
    there with a running threshold; here the cut is at the end of the prompt, and only there.

    Args:
        by_variance: whether layers differ; else all keep the same.
        recent: last slots that stay, with ``scope="prompt"``.
    """

    name: ClassVar[str] = "d2o"

    by_variance: bool = True
    recent: int = 32

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Column sums, by variance, merge above a threshold."""
        whole = self.scope == "prompt"
        action = MergeNearest("weighted", filtered=True, free_only=not whole)
        budget = ByVariance() if self.by_variance else CacheBudget()
        scope = Scope(self.scope, last=self.recent)
        return Eviction(ColumnSums(sinks=4 if whole else 0), self.amount, budget, action, scope)
