# SPDX-License-Identifier: Apache-2.0
"""The state of one forward of a reduced image encoder: which patches stand where, at each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visprune.core.selection import Selection
from visprune.core.trace import Trace
from visprune.errors import UnsupportedModel
from visprune.machine.encoder.padded import Group, hidden, refuse_dropout


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
        counts: how many each picture has, ``[B]``, where they differ; what is behind is padding.
    """

    count: int
    origin: Tensor | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    policy: Tensor | None = None
    carried: Tensor | None = None
    counts: Tensor | None = None

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
            first = index.clamp(min=0) if selection.count is not None else index
            origin = first if origin is None else origin.gather(1, first)
        if sized and (selection.merges or size is not None):
            size = selection.size
            if biased:
                # MKL's logarithm starts threads for any length, this one does not.
                bias = torch.nn.functional.pad((size - 1.0).log1p(), (prefix, 0))
        counts = None
        if self.counts is not None:
            counts, ragged = selection.count, selection.count is not None
            counts = torch.full_like(self.counts, selection.num_slots) if counts is None else counts
            if bias is self.bias:
                bias = hidden(counts, selection.num_slots, prefix) if ragged else None
        return TokenState(
            selection.num_slots, origin, size, bias, carried=selection.carried, counts=counts
        )


@dataclass(frozen=True)
class Away:
    """Patches that have left, and come back.

    Attributes:
        selection: by which they left.
        before: all patches, as they were then.
        after: those that stayed.
        graph: whether gradients were on when they left.
    """

    selection: Selection
    before: TokenState
    after: TokenState
    graph: bool

    def check(self) -> None:
        """Refuse a graph that would begin where they come back, and not where they left.

        Raises:
            UnsupportedModel: a reentrant checkpoint, which ran the layer where they left without
                one, and makes it layer by layer.
        """
        if torch.is_grad_enabled() and not self.graph:
            raise UnsupportedModel(
                "Reentrant gradient checkpointing takes layers one by one, and patches that have "
                "left come back at a later one: their gradient would be lost. Give "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


class EncoderPass:
    """One forward of the encoder; it belongs to that call alone.

    Args:
        grid: patches along height and width, of clips along time first.
        pictures: what methods are shown of the pixels, by signal.
        shapes: rows and columns of each picture, of an encoder that takes them as lists of patches.
        lengths: patches of each picture ``[B]``, where they differ and padding is behind them.
        groups: the pictures by their number of patches, in that case.
        back: the layer behind which patches that left are there again; ``None``: they are gone.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        pictures: dict[Any, Any] | None = None,
        *,
        shapes: list[tuple[int, int]] | None = None,
        lengths: Tensor | None = None,
        groups: list[Group] | None = None,
        back: int | None = None,
    ) -> None:
        self.grid: tuple[int, int, int] = (*((1,) * (3 - len(grid))), *grid)  # type: ignore[assignment]
        self.pictures = pictures or {}
        self.shapes, self.lengths, self.groups = shapes, lengths, groups
        self.back = back
        self.away: Away | None = None
        self.by_group: list[dict[Any, Tensor]] = []
        self.state = TokenState(0)
        self.layers: dict[int, TokenState] = {}
        self.attended: dict[int, int | Tensor] = {}
        self.mapped: dict[int, int | Tensor] = {}
        self.selections: dict[tuple[int, int], Selection] = {}
        self.decisions: dict[int, Tensor] = {}
        self.final: TokenState | None = None
        self.stream: Tensor | None = None
        self.entered: dict[int, Tensor] = {}
        self.signals: dict[Any, Any] = {}
        self.total = self.batch = 0
        self.asked = False  # whether a mean outside of the encoder took its sizes

    def enter(self, layer: int, x: Tensor, prefix: int) -> None:
        """Take the state that ``layer`` starts from, also when a checkpoint runs it again."""
        if not self.layers:
            self.batch, self.total = x.shape[0], x.shape[1] - prefix
            self._refuse_more()
            self.state = TokenState(self.total)
            if self.lengths is not None:
                refuse_dropout(self.total, self.grid[1] * self.grid[2])
                self.lengths = self.lengths.to(x.device)
                bias = hidden(self.lengths, self.total, prefix)
                self.state = TokenState(self.total, bias=bias, counts=self.lengths)
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

    def key_bias(self) -> Tensor | None:
        """What attention adds to the scores of each key; ``None``: what the model has done.

        While nothing has left a padded batch, the model's own mask hides the padding.
        """
        return None if self.untouched else self.state.bias

    @property
    def untouched(self) -> bool:
        """Whether this is a padded batch that every token is still in."""
        return self.lengths is not None and self.state.counts is self.lengths

    @property
    def plain(self) -> bool:
        """Whether a layer needs nothing of it now: no place, no size, no padding is followed."""
        state = self.state
        known = state.origin is None and state.bias is None and state.policy is None
        return known and state.counts is None and self.lengths is None and bool(self.layers)

    def alive(self) -> int | Tensor:
        """Patches of each picture now; a tensor ``[B]`` where they differ."""
        return self.state.count if self.state.counts is None else self.state.counts

    def pos(self, index: Tensor) -> Tensor:
        """(t, h, w) of patches ``[B, N]``: ``[B, N, 3]``."""
        frames, height, width = self.grid
        if self.shapes is not None:
            wide = torch.tensor([w for _, w in self.shapes], device=index.device)[:, None]
            return torch.stack([torch.zeros_like(index), index // wide, index % wide], dim=-1)
        if frames * height * width != self.total:
            # Patch dropout in training took some, and does not say which.
            height, width = 1, self.total
        place = index % (height * width)
        return torch.stack([index // (height * width), place // width, place % width], dim=-1)

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """(t, h, w) in patches of each picture."""
        if self.shapes is not None:
            return [(1, height, width) for height, width in self.shapes]
        return [self.grid] * self.batch

    def until(self, layer: int) -> list[Selection]:
        """The selections up to and in ``layer`` that are in force behind it, in their order."""
        if self.back is not None and layer >= self.back:
            return []
        return [self.selections[key] for key in sorted(self.selections) if key[0] <= layer]

    def bring_back(self, x: Tensor, prefix: int) -> Tensor:
        """All patches, ``[B, P + N, D]``, in place of those that stayed, ``[B, P + K, D]``."""
        if self.away is None:
            return x
        self.away.check()
        self.state = self.away.before
        patches = self.away.selection.expand(x[:, prefix:])
        return like(x, torch.cat([x[:, :prefix], patches], dim=1))

    def take_away(self, x: Tensor, prefix: int) -> Tensor:
        """Those that stayed, of all: undoes :meth:`bring_back`."""
        if self.away is None:
            return x
        self.state = self.away.after
        return like(x, self.away.selection.reduce(x, prefix))

    def expand(self, layer: int, y: Tensor) -> Tensor:
        """Undo all selections up to and in ``layer``."""
        for selection in reversed(self.until(layer)):
            y = selection.expand(y)
        return y

    def expanded(self, layer: int, x: Tensor, prefix: int) -> Tensor:
        """What leaves a layer ``[B, P + K, D]`` with the value of its slot for every patch."""
        patches = self.expand(layer, x[:, prefix:])
        return like(x, torch.cat([x[:, :prefix], patches], dim=1) if prefix else patches)

    def entering(self, layer: int, stage: int) -> Tensor:
        """The patch that each token stands for which a stage is given, ``[B, N]``.

        A checkpoint runs a layer again when all selections are there; those from this stage on do
        not count. 0 in padding.
        """
        whole = self._everything()
        for key in sorted(self.selections):
            if key < (layer, stage):
                whole = whole.then(self.selections[key])
        return whole.index.clamp(min=0)

    def composed(self, layer: int) -> Selection:
        """All selections up to and in ``layer`` as one."""
        whole = self._everything()
        for selection in self.until(layer):
            whole = whole.then(selection)
        return whole

    def _everything(self) -> Selection:
        """What keeps every patch, and no padding."""
        device = next((s.index.device for s in self.selections.values()), torch.device("cpu"))
        if self.lengths is None:
            return Selection.identity(self.batch, self.total, device)
        index, lengths = torch.arange(self.total, device=device), self.lengths.to(device)
        index = torch.where(index < lengths[:, None], index, -1)
        return Selection(index, self.total, count=lengths)

    def trace(self, layers: int, prefix: int, sites: dict[tuple[int, int], str]) -> Trace:
        """The record of this call.

        Args:
            layers: layers of the encoder.
            prefix: tokens before the patches.
            sites: name of the site of every stage, by layer and number.
        """
        whole = self.composed(layers)
        totals = [self.total] * self.batch if self.lengths is None else self.lengths.tolist()
        kept, pos = list(whole.index), list(self.pos(whole.index.clamp(min=0)))
        sizes, counts = list(whole.size), whole.counts
        everything = torch.arange(self.total, device=whole.index.device).expand(self.batch, -1)
        return Trace(
            model="vit",
            tokens_per_layer=self._per_picture(self.attended),
            mlp_tokens_per_layer=self._per_picture(self.mapped),
            kept=[x[:n] for x, n in zip(kept, counts, strict=True)],
            sizes=[x[:n] for x, n in zip(sizes, counts, strict=True)],
            pos=[x[:n] for x, n in zip(pos, counts, strict=True)],
            all_pos=[x[:n] for x, n in zip(self.pos(everything), totals, strict=True)],
            num_tokens=totals,
            image_rows=list(range(self.batch)),
            chosen=[[replace(whole.row(b), num_tokens=n)] for b, n in enumerate(totals)],
            prefix=prefix,
            grids=[(grid,) for grid in self.grids],
            stages=[
                {
                    "site": sites[key],
                    "before": selection.num_tokens,
                    "after": selection.num_slots,
                    **({} if self.away is None else {"restored": self.back}),
                }
                for key, selection in sorted(self.selections.items())
            ],
        )

    def _per_picture(self, found: dict[int, int | Tensor]) -> list[list[int]]:
        """Tokens of each picture, layer by layer."""
        layers = [found[number] for number in sorted(found)]
        each = [x.tolist() if isinstance(x, Tensor) else [x] * self.batch for x in layers]
        return [list(counts) for counts in zip(*each, strict=True)]


def like(x: Tensor, y: Tensor) -> Tensor:
    """``y`` ``[B, T, D]``, feature by feature in memory where ``x`` is."""
    return y if x.is_contiguous() else y.transpose(1, 2).contiguous().transpose(1, 2)
