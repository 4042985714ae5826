# SPDX-License-Identifier: Apache-2.0
"""FastV: drop the tokens that get little attention (ECCV 2024, arXiv:2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core.budget import Schedule, Stage
from visprune.core.method import BudgetedMethod, Context, ModelSpec
from visprune.core.needs import Needs
from visprune.core.selection import Selection
from visprune.core.site import Site
from visprune.core.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastV(BudgetedMethod):
    """Keeps the tokens that the prompt's last token attends to most in layer ``layer - 1``.

    The score is the mean over heads; ties keep the lower index. As in the official code, survivors
    keep their position ids, and ``keep_ratio`` n is rounded to the nearest (its parameter R is
    ``1 - keep_ratio``). There, all samples of a batch are pruned as the first one; here each by its
    own attention. The paper reads the attention that a token *receives on average*; the code, and
    this class, that of the last token.

    Args:
        layer: 0-based decoder layer on entering which the tokens are gone (the paper's K, 2 or 3).
    """

    name: ClassVar[str] = "fastv"

    layer: int | float = 2

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder."""
        return (Stage(Site.decoder(self.layer), self.budget, Needs(attention="last_query")),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Top-k of the last query's attention."""
        return Selection.top(ctx.shown("attention").mean(dim=1), ctx.num_keep)
