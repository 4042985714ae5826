# SPDX-License-Identifier: Apache-2.0
"""Top-k: drop the patches that the class token attends to least (arXiv:2308.04657)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from visprune.core import BudgetedMethod, Context, ModelSpec, Schedule, Selection, VisualTokens
from visprune.core.signals import ClsAttention
from visprune.methods._depths import DEPTHS, checked_depths, geometric


@dataclass(frozen=True, kw_only=True)
class TopK(BudgetedMethod):
    """Keeps, at three depths of an encoder, the patches that the class token attends to most.

    The baseline of "Which Tokens to Use?": between attention and MLP of layers 3, 6 and 9 of 12,
    ``int(keep_ratio ** s * n)`` of a picture's n patches stay after the s-th of them, by the class
    token's attention in that layer (mean over heads); in raster order, ties keep the lower index.
    With ``num_keep``, that many stay after the last, and the fraction kept at each is the same. A
    model without a class token is refused.

    Args:
        layers: where: 0-based layers, or fractions of the depth.
    """

    name: ClassVar[str] = "topk"

    layers: Sequence[int | float] = DEPTHS

    def __post_init__(self) -> None:
        """Check budget and layers."""
        super().__post_init__()
        object.__setattr__(self, "layers", checked_depths(self.layers))

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per layer."""
        needs = (ClsAttention("own"),)
        return geometric(self.budget, self.layers, spec, needs)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The most attended."""
        return Selection.top(ctx[ClsAttention("own")].mean(dim=1), ctx.num_keep)
