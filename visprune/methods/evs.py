# SPDX-License-Identifier: Apache-2.0
"""EVS: of a clip, keep what differs from the frame before (arXiv:2510.14624)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    Rounding,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import Frames

_FRAMES = Frames()


@dataclass(frozen=True, kw_only=True)
class EVS(BudgetedMethod):
    """Keeps the tokens of a clip that changed most since the frame before, at the projector.

    What changed is one minus the cosine of the projected feature with that of the same place in the
    frame before; the first frame counts as all new. ``keep_ratio`` n, rounded down, stay of a
    clip's n tokens, never fewer than its first frame has; ties keep the earlier token. Still
    pictures stay whole. This is the rule that vLLM ships; its pruning rate is ``1 - keep_ratio``.

    Difference: survivors keep their (t, h, w) positions, and the text goes on where the model
    itself puts it behind the whole clip. vLLM shifts it by the width of the clip's grid alone, so
    that in a clip of more frames or rows than columns it may stand among the frames.
    """

    name: ClassVar[str] = "evs"
    rounding: ClassVar[Rounding] = "floor"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector; pictures and first frames stay whatever the budget says."""
        return (Stage(Site.projector(), None, (_FRAMES,)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most changed."""
        batch, count = tokens.features.shape[:2]
        frames: Tensor = ctx[_FRAMES]
        first = int((frames[:1] == 0).sum()) if batch else 0
        if tokens.kind == "image" or first == count:
            return Selection.identity(batch, count, tokens.features.device)
        keep = max(first, self.budget.resolve(count, ctx.original or count))
        return Selection.top(changes(tokens.features, frames, tokens.pos), keep)

    def known_ahead(self, places: Sequence[tuple[int, int, int]], kind: str) -> int:
        """All of a picture; of a clip the budget, or its first frame."""
        count, first = len(places), sum(t == 0 for t, _, _ in places)
        if kind == "image" or first == count:
            return count
        return max(first, self.budget.resolve(count, count, strict=self.strict))

    def macs(self, count: int, keep: int, width: int) -> int:
        """One cosine a token."""
        return count * width


def changes(features: Tensor, frames: Tensor, pos: Tensor) -> Tensor:
    """One minus the cosine with the same place one frame before, 255 where there is none, [B, N].

    Args:
        features: ``[B, N, D]``, frame after frame.
        frames: of each token, ``[B, N]``.
        pos: ``[B, N, 3]``.
    """
    place = pos[..., 1] * (pos[..., 2].max() + 1) + pos[..., 2]
    order = place.argsort(dim=1, stable=True)  # place by place, frame after frame
    moved = features.gather(1, order[..., None].expand_as(features))
    change = 1.0 - cosine_similarity(moved[:, 1:].float(), moved[:, :-1].float(), dim=-1)
    sorted_place, sorted_frame = place.gather(1, order), frames.gather(1, order)
    follows = (sorted_place[:, 1:] == sorted_place[:, :-1]) & (
        sorted_frame[:, 1:] == sorted_frame[:, :-1] + 1
    )
    change = torch.nn.functional.pad(change.where(follows, 255.0), (1, 0), value=255.0)
    return torch.empty_like(change).scatter_(1, order, change)
