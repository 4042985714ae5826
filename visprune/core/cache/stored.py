# SPDX-License-Identifier: Apache-2.0
"""Actions that store what stays in another way: in fewer bits, with fewer channels, in pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from visprune.core.cache.parts import Action, HeadSlots, Looked
from visprune.core.cache.seen import CacheSeen


@dataclass(frozen=True)
class Quantise(Action):
    """Slots that may leave are stored as codes; what is protected stays plain.

    Attributes:
        bits: of the best slots.
        low_bits: of the others.
        low: the share of the slots that these are, rounded down.
        group: slots of a key's channel that share a scale.
        separable: whether a channel of values is divided by the root of its largest number before.
    """

    bits: int = 4
    low_bits: int = 2
    low: float = 0.0
    group: int = 32
    separable: bool = True

    @property
    def exact(self) -> bool:
        """Never: codes are rounded."""
        return False

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """Say how many bits each slot is worth; 0: it stays plain."""
        found = []
        for head, made in enumerate(super().apply(key, value, kept, looked)):
            coded = looked.free[made.index].nonzero()[:, 0]
            bits = torch.zeros(len(made.index), dtype=torch.int64, device=key.device)
            bits[coded] = self.bits
            score = looked.score[head, made.index[coded]]
            worst = score.argsort(stable=True)[: int(self.low * len(coded) + 1e-9)]
            bits[coded[worst]] = self.low_bits
            layout = (self.group, self.separable)
            found.append(replace(made, form="codes", apart=bits > 0, bits=bits, layout=layout))
        return found


@dataclass(frozen=True)
class DropChannels(Action):
    """Keys of slots that may leave lose the channels that matter least to queries.

    Attributes:
        ratio: share of the channels that go, rounded down.
        window: last queries that are looked at.
    """

    ratio: float = 0.4
    window: int = 32

    @property
    def exact(self) -> bool:
        """Whether no channel goes."""
        return self.ratio == 0.0

    def read(self, seen: CacheSeen) -> Tensor:
        """The mean square of the last queries, ``[Hk, d]``."""
        return seen.grouped(seen.query[:, seen.queries[-self.window :]].float().square().mean(1))

    def channels(self, squares: Tensor, key: Tensor) -> Tensor:
        """Channels that stay of a head's keys ``[S, d]``, in order."""
        score = squares * key.float().square().mean(0)
        gone = score.argsort(stable=True)[: int(len(score) * self.ratio)]
        stay = torch.ones(len(score), dtype=torch.bool, device=key.device)
        stay[gone] = False
        return stay.nonzero()[:, 0]

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """Say which channels, of which slots."""
        return [
            replace(
                made,
                form="thin",
                channels=self.channels(looked.action[head], made.key),
                apart=looked.free[made.index],
            )
            for head, made in enumerate(super().apply(key, value, kept, looked))
        ]


@dataclass(frozen=True)
class ReadPages(Action):
    """Nothing leaves, and each new token reads only the pages that it is near to.

    Attributes:
        page: slots of a page.
        top: pages that are read.
        by: see :class:`visprune.backbones.hf.pages.Pages`.
        after: see there.
        spread: of how many tokens the entropies say how many pages each layer reads (see
            ``Purse`` there), ``top`` in the mean; ``None``: all read ``top``.
    """

    page: int = 16
    top: int = 4
    by: Literal["cosine", "softmax"] = "cosine"
    after: int | None = None
    spread: int | None = None

    @property
    def exact(self) -> bool:
        """What is read is not all that is there."""
        return False

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """Say which slots lie in pages."""
        return [
            replace(
                made,
                form="pages",
                apart=looked.free[made.index],
                layout=(self.page, self.top, self.by, self.after, self.spread),
            )
            for made in super().apply(key, value, kept, looked)
        ]
