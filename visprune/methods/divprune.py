# SPDX-License-Identifier: Apache-2.0
"""DivPrune: keep tokens as far from each other as possible (CVPR 2025, arXiv:2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune import ops
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


@dataclass(frozen=True, kw_only=True)
class DivPrune(BudgetedMethod):
    """Max-min diversity of the projected features, by cosine distance.

    The first token is the one whose nearest neighbour is farthest; each next one has the largest
    distance to its nearest kept token. Kept tokens are in raster order, position ids close up
    (``positions="compact"``), and ``keep_ratio`` is rounded as in the official code. There, tokens
    already kept are not masked, so a constant picture repeats an index; here they are.
    """

    name: ClassVar[str] = "divprune"
    default_positions: ClassVar[PositionRule] = "compact"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Farthest-first from the most isolated token."""
        index = ops.greedy_diverse(
            tokens.features, ctx.num_keep, objective="k_center", pivot="farthest_neighbor"
        )
        return Selection.keep(index, tokens.num_tokens)

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines, once."""
        return count * count * width
