# SPDX-License-Identifier: Apache-2.0
"""SCOPE: tokens that are salient and cover what is not covered yet (arXiv:2510.24214)."""

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
from visprune.methods._saliency import attended, saliency


@dataclass(frozen=True, kw_only=True)
class SCOPE(BudgetedMethod):
    """Picks tokens greedily by saliency times gain of coverage, at the projector.

    A set of tokens covers each token by its largest cosine to it, at least 0. The next token is
    the one with the largest ``saliency ** alpha`` times what it adds to the sum over all tokens.
    Cosines are of the projected features. Saliency is the class token's attention in the encoder
    layer that the model reads, mean over heads; of an encoder without a class token, the mean
    attention that a patch receives there. Ties keep the lower index; kept tokens are in raster
    order.

    Difference: the batched code of AngelSlim, which this is compared with, picks a token again
    where nothing is left to gain; here every pick is another token.

    Args:
        alpha: weight of saliency.
    """

    name: ClassVar[str] = "scope"
    default_positions: ClassVar[PositionRule] = "compact"

    alpha: float = 1.0

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (saliency(spec),)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Greedy coverage."""
        weight = attended(ctx) ** self.alpha
        index = ops.greedy_coverage(tokens.features, weight, ctx.num_keep)
        return Selection.keep(index, tokens.num_tokens)

    def macs(self, count: int, keep: int, width: int) -> int:
        """All pairwise cosines, once; gains are sums."""
        return count * count * width
