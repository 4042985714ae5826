# SPDX-License-Identifier: Apache-2.0
"""AdaKV: the heads of a layer share one budget (NeurIPS 2025, arXiv:2407.11550)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visprune.core import ModelSpec
from visprune.core.cache import (
    CacheBudget,
    CacheMethod,
    ColumnSums,
    Eviction,
    JointHeads,
    KeyNorm,
    Pyramid,
    Scope,
    Score,
    WindowAttention,
)
from visprune.core.cache.seen import Group
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdaKV(CacheMethod):
    """A head whose attention is spread keeps more slots, one that looks at few keeps fewer.

    **Score**: that of another method (``over``); ``"snapkv"`` is Ada-SnapKV, the paper's own.
    **Budget**: the best of all heads of a layer together, with a floor for each. **Action**: drop.
    **Scope**: as given. Heads are stored with their own lengths, one after the other.

    As in the official code the heads' counts are rounded one by one, so that a layer's total may
    miss the budget by a few slots. ``floor`` is 0.2 in its ``pred.py`` and 0.5 in its README.

    Args:
        over: whose score.
        floor: the part of the budget that every head has.
        pyramid: PyramidKV's ``beta``, if the layers' budgets fall; ``None``: the same everywhere.
        normalize: weigh a head's scores by the share of them that its own best hold.
        window: queries that observe (``over="snapkv"``).
        kernel: of the pooling, odd.
        pool: maximum or average.
        group: over the query heads of a key head.
    """

    name: ClassVar[str] = "adakv"

    over: Literal["snapkv", "h2o", "knorm"] = "snapkv"
    floor: float = 0.2
    pyramid: int | None = None
    normalize: bool = False
    window: int = 32
    kernel: int = 7
    pool: Literal["avg", "max"] = "max"
    group: Group = "mean"

    def __post_init__(self) -> None:
        """Check values that have a range."""
        super().__post_init__()
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"floor is a share of the budget, in [0, 1]; got {self.floor}.")
        if self.over not in ("snapkv", "h2o", "knorm"):
            raise ConfigError(f"over is 'snapkv', 'h2o' or 'knorm', got {self.over!r}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Another's score, joint over heads, drop."""
        scores: dict[str, Score] = {
            "snapkv": WindowAttention(self.window, self.kernel, self.pool, "mean", self.group),
            "h2o": ColumnSums(group=self.group),
            "knorm": KeyNorm(),
        }
        layers = CacheBudget() if self.pyramid is None else Pyramid(self.pyramid)
        budget = JointHeads(layers, self.floor, self.normalize)
        scope = Scope(self.scope, last=self.window if self.over == "snapkv" else 0)
        return Eviction(scores[self.over], self.amount, budget, scope=scope)
