# SPDX-License-Identifier: Apache-2.0
"""The four parts of an eviction: which score, which budget, which action, over which scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visprune.core.budget import Budget, per_clip
from visprune.core.cache.seen import CacheSeen
from visprune.errors import BudgetError


@dataclass(frozen=True)
class Scope:
    """What a budget counts, and what may leave.

    Attributes:
        kind: ``"visual"``: visual tokens alone; text, newlines and separators are never touched.
            ``"prompt"``: everything, as the papers on text count.
        first: with ``"prompt"``, slots at the beginning that stay (sinks).
        last: slots at the end of the prompt that stay (recent ones, the window).
        last_share: the same as a share of the prompt, rounded down; the larger counts.
        text_stays: with ``"prompt"``, no text leaves either, though it counts.
    """

    kind: Literal["visual", "prompt"] = "visual"
    first: int = 0
    last: int = 0
    last_share: float = 0.0
    text_stays: bool = False

    def free(self, visual: Tensor, prompt: int) -> Tensor:
        """Which of L slots may leave, ``[L]``.

        Args:
            visual: which hold visual tokens that may leave, ``[L]``.
            prompt: slots of the prompt.
        """
        if self.kind == "visual":
            return visual
        steps = torch.arange(len(visual), device=visual.device)
        last = max(self.last, int(prompt * self.last_share + 1e-9))
        free = (steps >= self.first) & (steps < prompt - last)
        return free & visual if self.text_stays else free


@dataclass(frozen=True)
class Counted:
    """What an amount is resolved against, for one sample in one layer.

    Attributes:
        free: slots that may leave.
        prompt: slots of the prompt.
        pictures: of each picture, its tokens that are still there and those that it had at first.
        frames: of each picture, the tokens that each of its frames had; none, if it is no clip.
    """

    free: int
    prompt: int
    pictures: tuple[tuple[int, int], ...] = ()
    frames: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Amount:
    """How much stays, in one of four counts; none: the method decides itself.

    Attributes:
        num_keep: visual tokens of one picture.
        keep_ratio: share of its visual tokens; of the prompt's slots, if these are counted.
        max_cache: slots of the prompt in all, protected ones too.
        visual: whether visual tokens are counted.
        strict: whether more visual tokens than a picture has are refused.
        yields: what is protected may go beyond the amount, and then all else leaves.
        num_keep_per_frame: visual tokens of each frame of a clip.
    """

    num_keep: int | None = None
    keep_ratio: float | None = None
    max_cache: int | None = None
    visual: bool = True
    strict: bool = False
    yields: bool = False
    num_keep_per_frame: int | None = None

    @property
    def budget(self) -> Budget | None:
        """Of one picture, where visual tokens are counted by picture."""
        return Budget.maybe(self.num_keep, self.keep_ratio, self.num_keep_per_frame)

    def resolve(self, counted: Counted) -> int:
        """How many of the slots that may leave stay, for each head.

        Raises:
            BudgetError: the budget is below what is protected, or it counts frames and a picture
                is no clip.
        """
        budget = self.budget
        if budget is None and self.max_cache is None:
            return counted.free
        if self.visual and budget is not None:
            frames = counted.frames or ((),) * len(counted.pictures)
            each = zip(counted.pictures, frames, strict=True)
            kept = [self._of(budget, left, had, own) for (left, had), own in each if left]
            return min(counted.free, sum(kept))
        whole = self.max_cache
        if whole is None:
            whole = int((self.keep_ratio or 0.0) * counted.prompt + 1e-9)
        protected = counted.prompt - counted.free
        if whole < protected and self.yields:
            return 0
        if whole < protected:
            what = "text" if self.visual else "sinks and the recent window"
            raise BudgetError(
                f"A cache of {whole} slots is below the {protected} of its {counted.prompt} that "
                f"are protected ({what}). Give at least {protected}."
            )
        return min(counted.free, whole - protected)

    def _of(self, budget: Budget, left: int, had: int, frames: tuple[int, ...]) -> int:
        """What one picture keeps of the tokens that are left of those it had."""
        if budget.num_keep_per_frame is not None:
            budget = Budget(num_keep=per_clip(budget.num_keep_per_frame, frames))
        return budget.resolve(left, had, strict=self.strict)


@dataclass
class Looked:
    """What is known of one layer of one sample when budgets are shared out.

    Attributes:
        score: what ranks slots, the higher stays, ``[Hk, L]``.
        free: which may leave, ``[L]``.
        keep: how many of them the amount leaves to each head.
        counted: slots that the budget counts: the prompt, or the visual tokens that may leave.
        layer: 0-based.
        num_layers: of the decoder.
        budget: what the budget read.
        action: what the action read.
    """

    score: Tensor
    free: Tensor
    keep: int
    counted: int
    layer: int = 0
    num_layers: int = 1
    budget: Any = None
    action: Any = None

    @property
    def heads(self) -> int:
        """Hk."""
        return self.score.shape[0]

    @property
    def num_free(self) -> int:
        """Slots that may leave."""
        return int(self.free.sum())

    def ranked(self) -> Tensor:
        """Places of the free slots by falling score, ties by place, ``[Hk, F]``."""
        places = self.free.nonzero()[:, 0]
        order = self.score[:, places].argsort(dim=1, descending=True, stable=True)
        return places[order]

    def kept(self, counts: Tensor) -> list[Tensor]:
        """The slots that each head keeps, protected ones too, in order.

        Args:
            counts: of the free slots, how many, ``[Hk]``.
        """
        ranked, stay = self.ranked(), (~self.free).nonzero()[:, 0]
        return [
            torch.cat([stay, ranked[head, :count]]).sort().values
            for head, count in enumerate(counts.tolist())
        ]


@dataclass(frozen=True)
class Score:
    """What ranks the slots of a layer.

    Attributes:
        turns: whether it turns vectors on to other positions (``seen.turn``).
        running: whether it adds to what slots have received before (``seen.carried``), and so has
            to see every token.
    """

    turns: ClassVar[bool] = False
    running: ClassVar[bool] = False

    def read(self, seen: CacheSeen) -> Tensor:
        """The score of every slot, the higher stays: ``[Hk, L]``, or ``[1, L]`` for all heads."""
        raise NotImplementedError  # pragma: no cover - abstract


@dataclass(frozen=True)
class CacheBudget:
    """How many slots each head of each layer keeps. This one: the same everywhere."""

    def read(self, seen: CacheSeen) -> Any:
        """What it has to know of a layer besides the score."""
        return None

    def share(self, layers: Sequence[Looked]) -> list[Tensor]:
        """Of every layer, how many of its free slots each head keeps, ``[Hk]`` int64."""
        return [torch.full((x.heads,), x.keep) for x in layers]


@dataclass
class HeadSlots:
    """What one head keeps.

    Attributes:
        key: ``[n, d]``.
        value: ``[n, dv]``.
        index: the slot that each stands for, -1 where it is none of the prompt, ``[n]``.
        bias: what is added to the scores of each, ``[n]``; ``None``: nothing.
        form: how those ``apart`` are stored: as ``"codes"``, ``"thin"`` (without some channels of
            their keys) or in ``"pages"``.
        apart: which are not plain, ``[n]`` bool; ``None``: none.
        bits: of codes, of each slot, ``[n]``.
        channels: of thin keys, those that stay.
        layout: what else the form takes.
    """

    key: Tensor
    value: Tensor
    index: Tensor
    bias: Tensor | None = None
    form: Literal["plain", "codes", "thin", "pages"] = "plain"
    apart: Tensor | None = None
    bits: Tensor | None = None
    channels: Tensor | None = None
    layout: tuple[Any, ...] = ()

    @property
    def plain(self) -> Tensor:
        """Which slots are stored as they are, ``[n]`` bool."""
        if self.apart is None:
            return torch.ones(len(self.key), dtype=torch.bool, device=self.key.device)
        return ~self.apart


@dataclass(frozen=True)
class Action:
    """What becomes of the slots that are not kept. This one: they are dropped.

    Attributes:
        closes: whether slots that stay take the places that they have in the cache, where the
            positions of a run close up (``"compact"``).
    """

    closes: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        """Whether a layer of which all is kept stays as it was."""
        return True

    @property
    def hides(self) -> int:
        """The slot that stays and is not seen until the next cut, from the end; 0: none."""
        return 0

    def read(self, seen: CacheSeen) -> Any:
        """What it has to know of a layer besides keys and values."""
        return None

    def apply(
        self, key: Tensor, value: Tensor, kept: list[Tensor], looked: Looked
    ) -> list[HeadSlots]:
        """What each head stores.

        Args:
            key: ``[Hk, L, d]``.
            value: ``[Hk, L, dv]``.
            kept: of each head, the slots that stay, in order.
            looked: what is known of the layer.
        """
        return [
            HeadSlots(key[head, index], value[head, index], index)
            for head, index in enumerate(kept)
        ]


Same, Drop = CacheBudget, Action


@dataclass(frozen=True)
class Eviction:
    """A stage at the cache.

    Attributes:
        score: which slots matter.
        amount: how much stays.
        budget: how it is shared out over layers and heads.
        action: what becomes of the rest.
        scope: what may leave.
        every: tokens that a cache grows by, once its prompt is read, before it is cut again;
            ``None``: it grows on. Then every head of a layer keeps as many slots, and the amount is
            a number of slots in all.
    """

    score: Score
    amount: Amount = field(default_factory=Amount)
    budget: CacheBudget = field(default_factory=CacheBudget)
    action: Action = field(default_factory=Action)
    scope: Scope = field(default_factory=Scope)
    every: int | None = None

    def look(self, seen: CacheSeen, keep: int) -> Looked:
        """All that is known of a layer when budgets are shared out.

        Args:
            seen: the layer; its ``free`` is this scope's.
            keep: free slots that the amount leaves to each head.
        """
        score = self.score.read(seen).expand(seen.key.shape[0], -1)
        counted = int(seen.free.sum()) if self.scope.kind == "visual" else seen.prompt
        return Looked(
            score, seen.free, keep, counted, seen.layer, seen.num_layers,
            self.budget.read(seen), self.action.read(seen),
        )  # fmt: skip
