# SPDX-License-Identifier: Apache-2.0
"""How an amount is shared out over layers and heads, in other ways than evenly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visprune.core.cache.parts import CacheBudget, Looked
from visprune.core.cache.seen import CacheSeen
from visprune.errors import ConfigError


@dataclass(frozen=True)
class Pyramid(CacheBudget):
    """Deep layers keep less (PyramidKV, arXiv:2406.02069); the mean stays the amount.

    Where the prompt is shorter than twice the amount, all layers keep the same.

    Attributes:
        beta: the last layer keeps a ``beta``-th of the mean, about.
    """

    beta: int = 20

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """A line from the first layer to the last."""
        found = []
        for place, looked in enumerate(layers):
            base, room = looked.keep, looked.num_free
            count = base
            if base < room and looked.counted >= 2 * base:
                low = base // self.beta
                high = 2 * base - low
                if high >= room:
                    high, low = room, 2 * base - room
                count = high - place * ((high - low) // max(1, len(layers) - 1))
            found.append(torch.full((looked.heads,), count))
        return found


@dataclass(frozen=True)
class JointHeads(CacheBudget):
    """The heads of a layer share its budget by their scores (AdaKV, arXiv:2407.11550).

    The layer's total differs from the amount by the rounding of every head, as in the official
    code, which does not scale it back.

    Attributes:
        layers: what a layer's heads have on average.
        floor: the part of it that every head has.
        normalize: weigh the scores of a head by the share of them that its own best hold.
    """

    layers: CacheBudget = field(default_factory=CacheBudget)
    floor: float = 0.2
    normalize: bool = False

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """Count the best of all heads together."""
        found = []
        for looked, even in zip(layers, self.layers.share(layers), strict=True):
            base = min(int(even[0]), looked.num_free)
            found.append(even if base >= looked.num_free else self._heads(looked, base))
        return found

    def _heads(self, looked: Looked, base: int) -> Tensor:
        score = looked.score[:, looked.free]
        if self.normalize:
            best = score.topk(base, dim=1).values.sum(1) / score.sum(1)
            score = score * best[:, None]
        order = score.flatten().argsort(descending=True, stable=True)[: base * looked.heads]
        owner = torch.div(order, looked.num_free, rounding_mode="floor")
        won = torch.bincount(owner, minlength=looked.heads)
        floor = int(base * self.floor)
        return torch.round(won * (1 - self.floor) + floor).long().clamp(max=looked.num_free)


@dataclass(frozen=True)
class Listed(CacheBudget):
    """Every layer keeps what a list says, which someone has measured.

    Attributes:
        slots: of every layer, what it keeps; protected slots count where the prompt is counted.
    """

    slots: tuple[int, ...] = ()

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """As listed; at most what is there."""
        found = []
        for looked in layers:
            count = self.slots[looked.layer] - (looked.counted - looked.num_free)
            found.append(torch.full((looked.heads,), max(0, count)))
        return found


@dataclass(frozen=True)
class Gated(CacheBudget):
    """Key heads with large gates keep all, the others the amount, the first and last slots.

    Attributes:
        sparsity: share of all heads that do not keep all.
        gates: of every layer, of every key head; ``None``: measured on the prompt.
        window: queries that they are measured with.
    """

    sparsity: float = 0.5
    gates: tuple[tuple[float, ...], ...] | None = None
    window: int = 32

    def read(self, seen: CacheSeen) -> Tensor:
        """The gates of a layer, or what its last queries give to each slot that may leave."""
        if self.gates is not None:
            given, heads = self.gates[seen.layer], seen.key.shape[0]
            if len(given) != heads:
                raise ConfigError(
                    f"gates has {len(given)} numbers for decoder layer {seen.layer}, which has "
                    f"{heads} key heads. Give one each, or measure them on this model: `visprune "
                    f"calibrate heads`."
                )
            return torch.tensor(given, device=seen.key.device)
        rows = seen.grouped(seen.rows(seen.window(self.window)).mean(1))
        return rows.masked_fill(~seen.free, 0.0)

    def full(self, gates: Tensor) -> Tensor:
        """Which heads keep all, of gates ``[layers, Hk]``."""
        if self.sparsity >= 1:
            return torch.zeros_like(gates, dtype=torch.bool)
        if self.sparsity <= 0:
            return torch.ones_like(gates, dtype=torch.bool)
        return gates >= torch.quantile(gates.flatten(), self.sparsity)

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """All, or the amount."""
        gates = torch.stack([self.gate(looked) for looked in layers]).float()
        return [
            torch.where(full, looked.num_free, looked.keep).long()
            for full, looked in zip(self.full(gates), layers, strict=True)
        ]

    def gate(self, looked: Looked) -> Tensor:
        """Gates of a layer, ``[Hk]``: as given, or the attention to what a stream would drop."""
        given: Tensor = looked.budget
        if self.gates is not None:
            return given
        kept = looked.ranked()[:, : looked.keep]  # what a head that streams would see
        return given.sum(1) - given.gather(1, kept).sum(1)
