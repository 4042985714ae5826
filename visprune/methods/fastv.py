# SPDX-License-Identifier: Apache-2.0
"""FastV: drop the tokens that get little attention (ECCV 2024, arXiv:2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import (
    BudgetedMethod,
    Context,
    ModelSpec,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)
from visprune.core.signals import LastQueryAttention


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
        recompute: without a cache (``use_cache=False``, as the official accuracies were taken),
            choose anew for every generated token, by its predecessor. Otherwise what the prompt's
            last token chose stays, as with a cache.
    """

    name: ClassVar[str] = "fastv"

    layer: int | float = 2
    recompute: bool = False

    @property
    def asks_the_last_token(self) -> bool:
        """As ``recompute`` says."""
        return self.recompute

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder."""
        return (Stage(Site.decoder(self.layer), self.budget, needs=(LastQueryAttention(),)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Top-k of the last query's attention."""
        return Selection.top(ctx[LastQueryAttention()].mean(dim=1), ctx.num_keep)
