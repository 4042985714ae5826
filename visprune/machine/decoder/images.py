# SPDX-License-Identifier: Apache-2.0
"""What a forward keeps of each image and of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visprune.backbones.vlm.picture import ImageLayout
from visprune.core.selection import Selection
from visprune.core.slots import SlotTable

Step = Callable[[Tensor], Tensor]


@dataclass
class ImageState:
    """One image on its way through the layers.

    Attributes:
        layout: where it was in the input.
        tokens: its surviving tokens, as indices within the image, ``[K]``.
        slots: where they are in the current table, ``[K]``.
        fixed: where its protected tokens are, ``[F]``.
        size: patches that each survivor stands for, ``[K]``.
        query: whether the last of its tokens is the last of its row, which never leaves.
        chosen: its selections so far.
        given: tokens that each member of a chain was given, by its number.
        left: tokens, sizes and number of selections before all that was left went at once.
    """

    layout: ImageLayout
    tokens: Tensor
    slots: Tensor
    fixed: Tensor
    size: Tensor
    query: bool = False
    chosen: list[Selection] = field(default_factory=list)
    given: dict[int, int] = field(default_factory=dict)
    left: tuple[Tensor, Tensor, int] | None = None

    @classmethod
    def start(cls, layout: ImageLayout, last: int) -> ImageState:
        """All tokens in their places; ``last`` is the place of the row's last token."""
        is_free = layout.picture.free.to(layout.positions.device)
        free = layout.positions[is_free]
        return cls(
            layout=layout,
            tokens=torch.arange(len(free), device=free.device),
            slots=free,
            fixed=layout.positions[~is_free],
            size=torch.ones(len(free), device=free.device),
            query=len(layout.positions) > 0 and int(layout.positions[-1]) == last,
        )

    def taken(self, selection: Selection, slots: Tensor) -> None:
        """Take a selection; ``slots`` are the current ones of what it keeps."""
        index = selection.index[0].to(self.tokens.device)
        sizes = selection.sizes(self.size.to(selection.index.device)[None])[0]
        if len(self.tokens) and not len(index):
            self.left = (self.tokens, self.size, len(self.chosen))
        self.tokens, self.slots = self.tokens[index], slots
        self.size = sizes.to(self.size.device)
        self.chosen.append(selection)

    def kept(self) -> tuple[Tensor, Tensor, list[Selection]]:
        """Tokens, sizes and selections of the last stage that left some of the image."""
        if self.left is None:
            return self.tokens, self.size, self.chosen
        tokens, size, count = self.left
        return tokens, size, self.chosen[:count]

    def with_query(self, selection: Selection) -> Selection:
        """A selection of this image in which the row's last token stays.

        It is the query that the next token is predicted from: without it there is no next token.
        """
        if not self.query or not len(self.tokens) or not bool(self.layout.picture.free[-1]):
            return selection
        last = (self.tokens == len(self.layout.picture.pos) - 1).nonzero()[:, 0]
        last = last.to(selection.index.device)
        if not len(last) or bool((selection.index == last).any()):
            return selection
        own = selection.own
        if own is not None:
            own = torch.cat([own, own.new_ones(1, 1)], dim=1)
        index = torch.cat([selection.index, last[None]], dim=1)
        return Selection(
            index, selection.num_tokens, own, selection.source, selection.slot, selection.weight,
            gaps=selection.gaps, overlaps=True, entered=selection.entered, macs=selection.macs,
            evidence=selection.evidence,
        )  # fmt: skip


@dataclass
class Entered:
    """What one decoder layer was given, so that a recomputation can be given the same.

    Attributes:
        table: the slots that the layer works on.
        steps: how its stages shortened the hidden states.
        changed: keyword arguments that replace the model's own.
    """

    table: SlotTable
    steps: list[Step]
    changed: dict[str, Any]
