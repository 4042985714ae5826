# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: deep layers keep less (arXiv:2406.02069)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visprune.core import ModelSpec
from visprune.core.cache import CacheMethod, Eviction, Pyramid, Scope, WindowAttention
from visprune.core.cache.seen import Group
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PyramidKV(CacheMethod):
    """SnapKV's score with a budget that falls from layer to layer; ``num_keep`` is its mean.

    **Score**: attention of the last ``window`` queries, summed and pooled. **Budget**: a line
    through the amount, down to a ``beta``-th of it. **Action**: drop. **Scope**: as given.

    As in the code of its authors (KVCache-Factory), a prompt that is shorter than twice the budget
    keeps the same in every layer. Its defaults are those of the class; the run script there takes
    ``window=8, kernel=7, pool="max"``. It was not measured on vision-language models.

    Args:
        beta: how steep.
        window: queries that observe.
        kernel: of the pooling, odd.
        pool: average or maximum.
        group: over the query heads of a key head.
    """

    name: ClassVar[str] = "pyramidkv"

    beta: int = 20
    window: int = 32
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"
    group: Group = "mean"

    def __post_init__(self) -> None:
        """Check the slope."""
        super().__post_init__()
        if self.beta < 1:
            raise ConfigError(f"beta is at least 1 (1: no pyramid), got {self.beta}.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Window, pyramid, drop."""
        score = WindowAttention(self.window, self.kernel, self.pool, "sum", self.group)
        scope = Scope(self.scope, last=self.window)
        return Eviction(score, self.amount, Pyramid(self.beta), scope=scope)
