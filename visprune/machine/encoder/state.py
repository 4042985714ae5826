# SPDX-License-Identifier: Apache-2.0
"""The state of one forward of a reduced image encoder: which patches stand where, at each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visprune.core.selection import Selection
from visprune.core.trace import Trace
from visprune.errors import UnsupportedModel


@dataclass(frozen=True)
class TokenState:
    """The patches of a batch of pictures at one point of the encoder.

    Attributes:
        count: how many each picture has.
        origin: the patch that each stands for, ``[B, N]``; ``None``: all, in order, or not
            followed.
        size: patches merged into each, ``[B, N]``; ``None``: one each, or not followed.
        bias: what attention adds to the scores of each key, prefix tokens first, ``[B, T]``.
        policy: in the training of a method that learns: how much each counts as a key, 1 or 0
            with a gradient, ``[B, N]``; ``None``: 1.
        carried: what the method's last stage gave to each for the next, ``[B, N]``.
    """

    count: int
    origin: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    policy: Tensor | None = None
    carried: Tensor | None = None

    def reduced(
        self, selection: Selection, *, prefix: int, placed: bool, sized: bool, biased: bool
    ) -> TokenState:
        """The state after a selection.

        Args:
            selection: over these patches.
            prefix: tokens before them.
            placed: whether their origin is followed.
            sized: whether sizes are followed.
            biased: whether attention adds their logarithm.
        """
        index, origin, size, bias = selection.index, self.origin, self.size, self.bias
        if placed:
            origin = index if origin is None else origin.gather(1, index)
        if sized and (selection.merges or size is not None):
            size = selection.size
            if biased:
                bias = torch.nn.functional.pad(size.log(), (prefix, 0))
        return TokenState(selection.num_slots, origin, size, bias, carried=selection.carried)


class EncoderPass:
    """One forward of the encoder; it belongs to that call alone.

    Args:
        grid: patches along height and width, of clips along time first.
        pictures: what methods are shown of the pixels, by signal.
    """

    def __init__(self, grid: tuple[int, ...], pictures: dict[Any, Any] | None = None) -> None:
        self.grid: tuple[int, int, int] = (*((1,) * (3 - len(grid))), *grid)  # type: ignore[assignment]
        self.pictures = pictures or {}
        self.state = TokenState(0)
        self.layers: dict[int, TokenState] = {}
        self.attended: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.selections: dict[tuple[int, int], Selection] = {}
        self.decisions: dict[int, Tensor] = {}
        self.final: TokenState | None = None
        self.stream: Tensor | None = None
        self.signals: dict[Any, Any] = {}
        self.total = self.batch = 0

    def enter(self, layer: int, x: Tensor, prefix: int) -> None:
        """Take the state that ``layer`` starts from, also when a checkpoint runs it again."""
        if not self.layers:
            self.batch, self.total = x.shape[0], x.shape[1] - prefix
            self._refuse_more()
            self.state = TokenState(self.total)
        self.state = self.layers.setdefault(layer, self.state)

    def _refuse_more(self) -> None:
        """Raise where tokens lie behind the prefix that are no patches (patch dropout: fewer)."""
        patches = math.prod(self.grid)
        if self.total > patches:
            raise UnsupportedModel(
                f"The first layer is given {self.total} tokens behind the prefix, and the picture "
                f"has {patches} patches: other tokens (prompts, registers of one's own) would be "
                f"pruned and merged as if they were patches. Put them before the patches and count "
                f"them in num_prefix_tokens, or remove the run."
            )

    def pos(self, index: Tensor) -> Tensor:
        """(t, h, w) of patches ``[B, N]``: ``[B, N, 3]``."""
        frames, height, width = self.grid
        if frames * height * width != self.total:
            # Patch dropout in training took some, and does not say which.
            height, width = 1, self.total
        place = index % (height * width)
        return torch.stack([index // (height * width), place // width, place % width], dim=-1)

    def until(self, layer: int) -> list[Selection]:
        """The selections up to and in ``layer``, in the order in which they ran."""
        return [self.selections[key] for key in sorted(self.selections) if key[0] <= layer]

    def expand(self, layer: int, y: Tensor) -> Tensor:
        """Undo all selections up to and in ``layer``."""
        for selection in reversed(self.until(layer)):
            y = selection.expand(y)
        return y

    def entering(self, layer: int, stage: int) -> Tensor:
        """The patch that each token stands for which a stage is given, ``[B, N]``.

        A checkpoint runs a layer again when all selections are there; those from this stage on do
        not count.
        """
        whole = Selection.identity(self.batch, self.total, self._device())
        for key in sorted(self.selections):
            if key < (layer, stage):
                whole = whole.then(self.selections[key])
        return whole.index

    def composed(self, layer: int) -> Selection:
        """All selections up to and in ``layer`` as one."""
        whole = Selection.identity(self.batch, self.total, self._device())
        for selection in self.until(layer):
            whole = whole.then(selection)
        return whole

    def _device(self) -> torch.device:
        for selection in self.selections.values():
            return selection.index.device
        return torch.device("cpu")

    def trace(self, layers: int, prefix: int, sites: dict[tuple[int, int], str]) -> Trace:
        """The record of this call.

        Args:
            layers: layers of the encoder.
            prefix: tokens before the patches.
            sites: name of the site of every stage, by layer and number.
        """
        whole = self.composed(layers)
        entered = [self.attended[n] for n in sorted(self.attended)]
        inner = [self.mapped[n] for n in sorted(self.mapped)]
        everything = torch.arange(self.total, device=whole.index.device)[None]
        return Trace(
            model="vit",
            tokens_per_layer=[list(entered) for _ in range(self.batch)],
            mlp_tokens_per_layer=[list(inner) for _ in range(self.batch)],
            kept=list(whole.index),
            sizes=list(whole.size),
            pos=list(self.pos(whole.index)),
            all_pos=[self.pos(everything)[0]] * self.batch,
            num_tokens=[self.total] * self.batch,
            image_rows=list(range(self.batch)),
            chosen=[[whole.row(n)] for n in range(self.batch)],
            prefix=prefix,
            grids=[(self.grid,)] * self.batch,
            stages=[
                {
                    "site": sites[key],
                    "before": selection.num_tokens,
                    "after": selection.num_slots,
                }
                for key, selection in sorted(self.selections.items())
            ],
        )
