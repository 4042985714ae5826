# SPDX-License-Identifier: Apache-2.0
"""PrefixKV: one threshold of mass says what each layer forgets (NeurIPS 2025, arXiv:2412.03409)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import ModelSpec
from visprune.core.cache import CacheBudget, CacheMethod, ColumnSums, Eviction, Looked, Scope
from visprune.errors import ConfigError

_NEAR, _TRIES = 5, 100  # the official search ends within five slots, or never


@dataclass(frozen=True)
class ByPrefix(CacheBudget):
    """What each layer forgets: beyond one share of its mass, the same for all layers.

    Attributes:
        ratios: of every layer, the share of the counted slots that it forgets; ``None``: searched
            for on the sample itself.
        forget: the mean of what is searched for; ``None``: what the amount leaves.
        protected: slots that stay besides.
    """

    ratios: tuple[float, ...] | None = None
    forget: float | None = None
    protected: int = 0

    def forgotten(self, layers: Sequence[Looked]) -> list[int]:
        """Slots that each layer forgets."""
        if self.ratios is not None:
            return [round(self.ratios[x.layer] * x.counted) for x in layers]
        target = sum(float(x.num_free - x.keep) for x in layers)
        if self.forget is not None:
            target = self.forget * sum(x.counted for x in layers)
        return self._search([self._mass(x) for x in layers], target)

    def _mass(self, looked: Looked) -> Tensor:
        """The share of mass that the best n slots hold, for n = 1, 2, ..."""
        score = looked.score[0] if self.protected else looked.score[0][looked.free]
        score = score.double().sort(descending=True).values
        return (score / score.sum()).cumsum(0)

    def _search(self, masses: list[Tensor], target: float) -> list[int]:
        low, high = 0.0, 1.0
        counts = [0] * len(masses)
        for _ in range(_TRIES):
            middle = (low + high) / 2
            first = [min(len(m) - 1, int((m < middle).sum())) for m in masses]
            counts = [
                max(0, len(m) - (n + 1) - self.protected)
                for m, n in zip(masses, first, strict=True)
            ]
            if abs(sum(counts) - target) < _NEAR:
                break
            low, high = (low, middle) if sum(counts) < target else (middle, high)
        total = sum(counts)
        return [int(count * target / total) if total else 0 for count in counts]

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """The lowest go."""
        if self.ratios is None and all(x.keep >= x.num_free for x in layers):
            return super().share(layers)
        gone = self.forgotten(layers)
        return [
            torch.full((x.heads,), max(0, x.num_free - n))
            for x, n in zip(layers, gone, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class PrefixKV(CacheMethod):
    """A layer keeps as many slots as hold a share of its attention that is the same for all layers.

    **Score**: column sums over the whole prompt, mean of heads: one set a layer. **Budget**: by the
    mass that is kept, so that the amount is the mean of the layers. **Action**: drop. **Scope**:
    with ``"prompt"``, as published, the first ``sinks`` slots and the last one stay.

    The official lists of layers' ratios are averages of such searches over samples, one list for
    each amount; ``ratios`` takes one. Without it the search is made on the sample itself (and ends,
    which the official one need not). What the official code forgets while tokens are decoded, one
    slot at a fixed place, is not done.

    Args:
        ratios: of every layer, the share that it *forgets*, in place of a search.
        sinks: slots at the beginning that stay, with ``scope="prompt"``.
    """

    name: ClassVar[str] = "prefixkv"

    ratios: tuple[float, ...] | None = None
    sinks: int = 4

    def _check_amount(self) -> None:
        if self.ratios is None:
            super()._check_amount()
        elif self.amount.budget is not None or self.max_cache is not None:
            raise ConfigError("prefixkv takes ratios of every layer, or one budget; not both.")

    def eviction(self, spec: ModelSpec) -> Eviction:
        """Column sums, by mass, drop."""
        if self.ratios is not None and len(self.ratios) != spec.num_layers:
            raise ConfigError(
                f"prefixkv: ratios has {len(self.ratios)} entries; {spec.family} has "
                f"{spec.num_layers} layers. Give one each."
            )
        whole = self.scope == "prompt"
        forget = 1 - self.keep_ratio if whole and self.keep_ratio is not None else None
        ratios = None if self.ratios is None else tuple(self.ratios)
        budget = ByPrefix(ratios, forget, self.sinks + 1 if whole else 0)
        scope = Scope(self.scope, first=self.sinks, last=1)
        return Eviction(ColumnSums(group="all"), self.amount, budget, scope=scope)
