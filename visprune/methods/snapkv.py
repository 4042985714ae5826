# SPDX-License-Identifier: Apache-2.0
"""SnapKV: keep what the end of the prompt looks at (NeurIPS 2024, arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, Scope, WindowAttention
from visprune.core.cache.seen import Group


@dataclass(frozen=True, kw_only=True)
class SnapKV(CacheMethod):
    """Each key head keeps the slots that the last queries attend to most, smoothed.

    **Score**: attention of the last ``window`` queries, summed, pooled over neighbouring slots.
    **Budget**: the same everywhere. **Action**: drop. **Scope**: with ``"prompt"``, as published,
    the window stays and counts; with ``"visual"`` the observers are the text behind the pictures
    (at most ``window`` of it), and pooling runs over the visual tokens.

    Scores of the query heads of one key head are averaged. The official code repeats keys to all
    query heads and lets each choose, which stores a slot once for each that wants it. Kept slots
    lie by position (there, by falling score); attention does not depend on it.

    Args:
        window: queries that observe.
        kernel: of the pooling, odd.
        pool: average or maximum.
        group: over the query heads of a key head.
    """

    name: ClassVar[str] = "snapkv"

    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    group: Group = "mean"

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Window, same everywhere, drop."""
        score = WindowAttention(self.window, self.kernel, self.pool, "sum", self.group)
        return Eviction(score, self.amount, scope=Scope(self.scope, last=self.window))
