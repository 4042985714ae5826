# SPDX-License-Identifier: Apache-2.0
"""Merges in which every picture has the same number of tokens that go into a slot of another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visprune.core.selection import Selection, add_rows, behind, take_rows
from visprune.errors import ConfigError


@dataclass(frozen=True)
class PairMerge(Selection):
    """A map given by its pairs, which is applied row by row.

    ``out[s] = kept_weight[s] * x[index[s]] + sum over r with slot[r] == s of came_weight[r] *
    x[source[r]]``; tokens that are neither in ``index`` nor in ``source`` are dropped. The explicit
    ``dest`` and ``weight`` of a :class:`Selection` are made when they are asked for.

    Attributes:
        source: tokens that come to a slot, ``[B, R]``.
        slot: which, ``[B, R]``.
        kept_weight: of the token that each slot stands for, ``[B, K]``.
        came_weight: of each of ``source``, ``[B, R]``.
    """

    source: Tensor | None = None
    slot: Tensor | None = None
    kept_weight: Tensor | None = None
    came_weight: Tensor | None = None

    @classmethod
    def mean(cls, index: Tensor, source: Tensor, slot: Tensor, size: Tensor) -> PairMerge:
        """Merge tokens into the mean of their slot, weighted by their sizes ``[B, N]``."""
        kept, came = size.gather(1, index), size.gather(1, source)
        total = kept.scatter_add(1, slot, came)
        return cls(
            index,
            index.shape[1] + source.shape[1],
            source=source,
            slot=slot,
            kept_weight=kept / total,
            came_weight=came / total.gather(1, slot),
        )

    @property
    def merges(self) -> bool:
        """Slots are sums of tokens."""
        return True

    def _pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = (self.source, self.slot, self.kept_weight, self.came_weight)
        source, slot, kept, came = parts
        if source is None or slot is None or kept is None or came is None:
            raise ConfigError("PairMerge takes source, slot, kept_weight and came_weight.")
        return source, slot, kept, came

    def _map(self) -> tuple[Tensor, Tensor]:
        source, slot, kept, came = self._pairs()
        batch, slots = self.index.shape
        dest = self.index.new_full((batch, self.num_tokens), -1)
        own = torch.arange(slots, device=dest.device).expand(batch, -1)
        dest = dest.scatter(1, self.index, own).scatter(1, source, slot)
        weight = kept.new_zeros(batch, self.num_tokens)
        return dest, weight.scatter(1, self.index, kept).scatter(1, source, came)

    def reduce(self, x: Tensor) -> Tensor:
        """Apply the map to ``x`` ``[B, N, D]``."""
        return self.reduce_behind(x, 0)

    def reduce_behind(self, x: Tensor, prefix: int) -> Tensor:
        """Apply the map behind ``prefix`` tokens: one pick of rows, scaled and added to."""
        source, slot, kept, came = self._pairs()
        wide = torch.promote_types(x.dtype, torch.float32)
        out = take_rows(x, behind(self.index, prefix)).to(wide)
        out[:, prefix:] *= kept[..., None]
        rows = take_rows(x, source + prefix).to(wide) * came[..., None]
        return add_rows(out, slot + prefix, rows).to(x.dtype)

    def sizes(self, size: Tensor) -> Tensor:
        """Return how many patches each slot stands for, given ``size`` ``[B, N]``: ``[B, K]``."""
        source, slot, _, _ = self._pairs()
        return size.gather(1, self.index).scatter_add(1, slot, size.gather(1, source))
