# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: keep what the class token looks at (arXiv:2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
from visprune.core.signals import ClsAttention

_SEEN = ClsAttention("feature")


@dataclass(frozen=True, kw_only=True)
class FasterVLM(BudgetedMethod):
    """Keeps the patches that the class token attends to most, at the projector.

    The score is the class token's attention in the encoder layer whose output the model reads, mean
    over heads; ties keep the lower index; kept tokens are in raster order, and position ids close
    up (``positions="compact"``), as in the official code. An encoder without a class token is
    refused.

    Difference: the official code gives each crop of a tiled picture the same budget; here the
    picture has one.
    """

    name: ClassVar[str] = "fastervlm"
    default_positions: ClassVar[PositionRule] = "compact"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector."""
        return (Stage(Site.projector(), self.budget, (_SEEN,)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most attended."""
        return Selection.top(ctx[_SEEN].mean(dim=1), ctx.num_keep)
