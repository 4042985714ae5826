# SPDX-License-Identifier: Apache-2.0
"""HiPrune: anchors of a middle layer, their neighbours, and registers (arXiv:2508.00553)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    PositionRule,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import ReceivedAttention
from visprune.errors import ConfigError

_DEEP = ReceivedAttention("feature")


@dataclass(frozen=True, kw_only=True)
class HiPrune(BudgetedMethod):
    """Keeps patches by the attention that they receive in two layers of the encoder.

    Attention is the mean over heads and over all queries, class token included, so that an encoder
    needs none. ``round(alpha * k / 5)`` anchors are the largest of the object layer (the ninth of
    24); their four neighbours stay with them; the largest of the layer that the model reads fill
    the budget up. Ties keep the lower index.

    Differences: the official code takes the patches before and after an anchor in the flat order
    for its neighbours, which at the edge of the picture lie at the other end of the row above or
    below, and those beyond the picture for its corners; here an edge has no neighbour beyond it
    (``official=True``: as there). Where anchors and neighbours are more than the budget, as many
    anchors fit as do. The official code gives each crop of a tiled picture the same budget.

    Args:
        alpha: share of the budget for anchors and neighbours, in [0, 1].
        layer: the object layer, 0-based, or a fraction of the encoder's depth (the official code
            has the 16th of Qwen2.5-VL: 15).
        official: neighbours in the flat order.
    """

    name: ClassVar[str] = "hiprune"
    default_positions: ClassVar[PositionRule] = "compact"

    alpha: float = 0.1
    layer: int | float = 1 / 3
    official: bool = False

    def __post_init__(self) -> None:
        """Check the share."""
        super().__post_init__()
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha is a share of the budget, in [0, 1]; got {self.alpha!r}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        needs = (ReceivedAttention(self.layer), _DEEP)
        return (Stage(Site.projector(), self.budget, needs),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Anchors, neighbours, registers."""
        keep = ctx.num_keep
        count = min(round(keep * self.alpha / 5), keep // 5)
        shallow = ctx[ReceivedAttention(self.layer)].mean(dim=1)
        anchors = shallow.argsort(dim=1, descending=True, stable=True)[:, :count]
        near = _flat(anchors, tokens.pos) if self.official else _beside(anchors, tokens.pos)
        chosen = torch.zeros_like(shallow, dtype=torch.bool).scatter(1, anchors, True)
        chosen = chosen | near
        return Selection.top(ctx[_DEEP].mean(dim=1).masked_fill(chosen, float("inf")), keep)


def _flat(anchors: Tensor, pos: Tensor) -> Tensor:
    """Which tokens are one or a row before or behind an anchor in the sequence, ``[B, N]``."""
    count, width = pos.shape[1], int(pos[..., 2].max()) + 1
    steps = torch.tensor([-1, 1, -width, width], device=anchors.device)
    near = (anchors[..., None] + steps).clamp(0, count - 1).flatten(1)
    return torch.zeros(pos.shape[:2], dtype=torch.bool, device=pos.device).scatter(1, near, True)


def _beside(anchors: Tensor, pos: Tensor) -> Tensor:
    """Which tokens lie beside, above or below an anchor in the same region, ``[B, N]``."""
    own = pos.gather(1, anchors[..., None].expand(-1, -1, 3))
    apart = (pos[:, :, None] - own[:, None]).abs()  # [B, N, A, 3]
    return ((apart[..., 0] == 0) & (apart[..., 1] + apart[..., 2] == 1)).any(2)
