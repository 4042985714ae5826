# SPDX-License-Identifier: Apache-2.0
"""What else becomes of slots that are not kept: they merge into one that is, or become a mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.cache.parts import Action, HeadSlots, Looked
from visprune.core.cache.seen import CacheSeen, turned
from visprune.errors import UnsupportedModel


@dataclass(frozen=True)
class CloseUp(Action):
    """Slots that stay move up over those that leave: their keys are turned on to their new places.

    So a cache that is cut again and again never leaves the positions that a model was trained for.
    It is the same as storing keys before their rotary embedding and giving each the place that it
    has in the cache. Heads have to keep the same number of slots.
    """

    closes: ClassVar[bool] = True

    def read(self, seen: CacheSeen) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """What turns keys; ``None``: that is not known."""
        return seen.turn

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """Turn each key by the places that it moves.

        Raises:
            UnsupportedModel: how keys are turned is not known.
        """
        if looked.action is None:
            raise UnsupportedModel(
                "Slots that stay take new places, for which keys are turned on: that is known of "
                "decoders that turn whole heads, half against half, along a line. Use "
                "positions='original', which leaves keys as they are."
            )
        found = super().apply(key, value, kept, looked)
        for slots in found:
            moves = torch.arange(len(slots.index), device=slots.index.device) - slots.index
            cos, sin = looked.action(moves)
            scaling = (cos.square() + sin.square()).sqrt()  # some families scale the embedding
            slots.key = (turned(slots.key.float(), cos, sin) / scaling).to(key.dtype)
        return found


@dataclass(frozen=True)
class DropAndHide(Action):
    """What is not kept is dropped, and of what is, one slot is stored and not seen for one cut.

    Attributes:
        place: which slot, counted from the end of the cache.
    """

    place: int = 0

    @property
    def hides(self) -> int:
        """That slot."""
        return self.place


@dataclass(frozen=True)
class Compensate(Action):
    """What a head drops becomes one slot, with their mean key and value, as often as they were."""

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """One slot in front of those that are kept."""
        found = []
        for head, index in enumerate(kept):
            gone = torch.ones(key.shape[1], dtype=torch.bool, device=key.device)
            gone[index] = False
            count = int(gone.sum())
            if not count:
                found.append(HeadSlots(key[head], value[head], index))
                continue
            mean_key, mean_value = (x[head, gone].mean(0, keepdim=True) for x in (key, value))
            bias = torch.zeros(len(index) + 1, device=key.device)
            bias[0] = math.log(count)
            found.append(
                HeadSlots(
                    torch.cat([mean_key, key[head, index]]),
                    torch.cat([mean_value, value[head, index]]),
                    torch.cat([index.new_full((1,), -1), index]),
                    bias,
                )
            )
        return found


@dataclass(frozen=True)
class MergeNearest(Action):
    """A dropped slot goes into the kept one whose key is nearest in direction.

    Attributes:
        how: ``"pivot"``: a kept slot becomes the mean of itself and of the midpoints to those that
            come to it; ``"average"``: of itself and them; ``"weighted"``: of itself and them times
            their cosine.
        filtered: slots that are dropped together (the n-th of every head) merge only if the mean
            of their cosines reaches the mean of all; the others are lost.
        official: with ``"average"``, what the official code of LOOK-M does: the slots that pass
            hand their targets to the first slots in line.
        free_only: kept slots that may not leave (text) take nothing in.
        threshold: a number to reach in place of the mean of all; see :meth:`apply`.
    """

    how: Literal["pivot", "average", "weighted"] = "pivot"
    filtered: bool = False
    official: bool = False
    free_only: bool = True
    threshold: float | None = None

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """Merge, if heads drop equally many (a rule over heads), or each for itself."""
        heads = [self._nearest(key[h], kept[h], looked) for h in range(len(kept))]
        passed: Tensor | None = None
        if self.filtered and len({len(gone) for gone, _, _ in heads}) == 1 and len(heads[0][0]):
            cosine = torch.stack([c for _, _, c in heads]).mean(0)
            bound = cosine.mean() if self.threshold is None else self.threshold
            passed = cosine >= bound
        return [
            self._merged(key[h], value[h], kept[h], *heads[h], passed) for h in range(len(kept))
        ]

    def _nearest(self, key: Tensor, kept: Tensor, looked: Looked) -> tuple[Tensor, Tensor, Tensor]:
        """Slots that are dropped, the place in ``kept`` that each goes to, and the cosine."""
        gone = torch.ones(len(key), dtype=torch.bool, device=key.device)
        gone[kept] = False
        gone = gone.nonzero()[:, 0]
        takes = looked.free[kept] if self.free_only else torch.ones_like(kept, dtype=torch.bool)
        if not len(gone) or not bool(takes.any()):
            return gone[:0], gone[:0], key.new_zeros(0)
        unit = torch.nn.functional.normalize(key.float(), dim=-1)
        cosine = (unit[gone] @ unit[kept].T).masked_fill(~takes, -torch.inf)
        best = cosine.max(dim=1)
        return gone, best.indices, best.values

    def _merged(
        self,
        key: Tensor,
        value: Tensor,
        kept: Tensor,
        gone: Tensor,
        target: Tensor,
        cosine: Tensor,
        passed: Tensor | None,
    ) -> HeadSlots:
        source = gone
        if passed is not None:
            target, cosine = target[passed], cosine[passed]
            source = gone[: len(target)] if self.official else gone[passed]
        found = []
        for x in (key, value):
            mine = x[kept].float()
            coming = x[source].float()
            if self.how == "pivot":
                coming = (coming + mine[target]) / 2
            elif self.how == "weighted":
                coming = coming * cosine[:, None]
            total = mine.index_add(0, target, coming)
            count = torch.ones(len(kept), device=x.device)
            count = count.index_add(0, target, torch.ones_like(cosine))
            found.append((total / count[:, None]).to(x.dtype))
        return HeadSlots(found[0], found[1], kept)


@dataclass(frozen=True)
class MergeNeighbours(Action):
    """Neighbouring slots with keys of one direction become one, until the count is reached.

    Of a set the slot with the highest score is the pivot; keys and values are means, weighted by
    a Gaussian of the distance to the pivot's key.

    Attributes:
        counts: a set counts as often as it has slots (the logarithm is added to its scores).
    """

    counts: bool = True

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """Sets of each head; ``kept`` tells how many slots it is left with."""
        return [
            self._sets(key[h], value[h], len(kept[h]), looked.score[h], looked.free)
            for h in range(len(kept))
        ]

    def _sets(
        self, key: Tensor, value: Tensor, count: int, score: Tensor, free: Tensor
    ) -> HeadSlots:
        length = len(key)
        near = torch.nn.functional.cosine_similarity(key[1:].float(), key[:-1].float(), dim=-1)
        near = near.masked_fill(~(free[1:] & free[:-1]), -torch.inf)
        joined = torch.zeros(length, dtype=torch.bool, device=key.device)
        order = near.argsort(descending=True, stable=True)[: length - count]
        order = order[torch.isfinite(near[order])]
        joined[order + 1] = True
        owner = (~joined).cumsum(0) - 1  # the set of every slot
        sets = int(owner[-1]) + 1
        best = score.new_full((sets,), -torch.inf).scatter_reduce(0, owner, score, "amax")
        steps = torch.arange(length, device=key.device)
        pivot = torch.where(score >= best[owner], steps, length)
        pivot = steps.new_full((sets,), length).scatter_reduce(0, owner, pivot, "amin")
        apart = (key.float() - key[pivot].float()[owner]).square().sum(-1)
        size = torch.zeros(sets, device=key.device).index_add(0, owner, torch.ones_like(apart))
        mean = torch.zeros(sets, device=key.device).index_add(0, owner, apart.sqrt()) / size
        spread = 2 * mean[owner].square()
        weight = torch.where(spread > 0, (-apart / spread.clamp(min=1e-20)).exp(), 1.0)
        total = torch.zeros(sets, device=key.device).index_add(0, owner, weight)
        share = (weight / total[owner])[:, None]
        made = [
            torch.zeros(sets, x.shape[1], device=x.device).index_add(0, owner, share * x.float())
            for x in (key, value)
        ]
        bias = size.log() if self.counts and bool((size > 1).any()) else None
        return HeadSlots(made[0].to(key.dtype), made[1].to(value.dtype), pivot, bias)
