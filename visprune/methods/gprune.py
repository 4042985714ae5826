# SPDX-License-Identifier: Apache-2.0
"""G-Prune: importance that spreads over a graph of likeness (AAAI 2025, arXiv:2501.02268)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visprune import ops
from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    PositionRule,
    Rounding,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)


@dataclass(frozen=True, kw_only=True)
class GPrune(BudgetedMethod):
    """Keeps the tokens where importance gathers that spreads over similar tokens.

    At the projector: cosines below ``similarity`` are no edge; the softmax over a row's cosines
    divided by ``temperature`` says how a token hands its importance on, ``power`` times; it begins
    with the length of the feature, and what a token has in the end is divided by its number of
    edges. The most important stay, in raster order; ``keep_ratio`` n is rounded down, and a tiled
    picture's thumbnail and crops are ranked apart, as in the official code.

    Difference: the official code raises the matrix to its power; here a vector meets it so often,
    the same in exact numbers.

    Args:
        similarity: cosine from which two tokens are joined.
        temperature: of the softmax.
        power: how often importance is handed on.
    """

    name: ClassVar[str] = "gprune"
    rounding: ClassVar[Rounding] = "floor"
    default_positions: ClassVar[PositionRule] = "compact"

    similarity: float = 0.5
    temperature: float = 0.03
    power: int = 5

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most important of each region."""
        region = torch.zeros_like(tokens.pos[..., 0])
        if tokens.kind == "image":
            region = tokens.pos[..., 0]
        score = self.importance(tokens.features.float(), region)
        quota = ops.shares(region, ctx.num_keep)
        rank = ops.rank_within(score, region)
        return Selection.top((rank < quota.gather(1, region)).float(), ctx.num_keep)

    def importance(self, features: Tensor, region: Tensor) -> Tensor:
        """The score of every token, ``[B, N]``; importance stays within a region ``[B, N]``."""
        score = torch.empty_like(features[..., 0])
        for part in region[0].unique().tolist():  # pictures that are ranked together are cut alike
            own = region[0] == part
            score[:, own] = self._spread(features[:, own])
        return score

    def _spread(self, features: Tensor) -> Tensor:
        unit = normalize(features, dim=-1)
        graph = unit @ unit.transpose(1, 2)
        apart = graph < self.similarity
        graph = graph.div_(self.temperature).masked_fill_(apart, -5000.0).softmax(dim=-1)
        edges = (graph > 0).sum(dim=-1)
        spread = features.norm(dim=-1)[:, None]
        for _ in range(self.power):
            spread = spread @ graph
        return spread[:, 0] / edges

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines, and a product with the graph each time."""
        return count * count * (width + self.power)
