# SPDX-License-Identifier: Apache-2.0
"""CompressKV: ask the heads that retrieve (arXiv:2508.02401)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visprune.core import ModelSpec
from visprune.core.cache import (
    CacheBudget,
    CacheMethod,
    Eviction,
    Listed,
    Scope,
    WindowAttention,
)
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompressKV(CacheMethod):
    """A layer keeps one set of slots for all heads, chosen by a few of its query heads.

    **Score**: attention of the last ``window`` queries in the layer's ``heads``, pooled, their
    mean. **Budget**: given layer by layer (``slots``), or the same everywhere. **Action**: drop.
    **Scope**: as given.

    Which heads retrieve, and what each layer needs, is measured offline by the authors for a few
    language models. Without ``heads`` all query heads are asked.

    Args:
        heads: of every layer, its query heads, best first.
        first: how many of them are asked.
        slots: of every layer, what it keeps, in place of one budget.
        window: queries that observe.
        kernel: of the pooling, odd.
        pool: average or maximum.
    """

    name: ClassVar[str] = "compresskv"

    heads: tuple[tuple[int, ...], ...] | None = None
    first: int = 4
    slots: tuple[int, ...] | None = None
    window: int = 8
    kernel: int = 5
    pool: Literal["avg", "max"] = "avg"

    def _check_amount(self) -> None:
        if self.slots is None:
            super()._check_amount()
        elif self.amount.budget is not None or self.max_cache is not None:
            raise ConfigError("compresskv takes slots of every layer, or one budget; not both.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """A few heads' window, listed budgets, drop."""
        for name, given in (("heads", self.heads), ("slots", self.slots)):
            if given is not None and len(given) != spec.num_layers:
                raise ConfigError(
                    f"compresskv: {name} has {len(given)} entries; {spec.family} has "
                    f"{spec.num_layers} layers. Give one each."
                )
        heads = self.heads and tuple(tuple(x)[: self.first] for x in self.heads)
        score = WindowAttention(self.window, self.kernel, self.pool, "sum", "all", heads)
        budget = CacheBudget() if self.slots is None else Listed(tuple(self.slots))
        scope = Scope(self.scope, last=self.window)
        return Eviction(score, self.amount, budget, scope=scope)
