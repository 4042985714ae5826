# SPDX-License-Identifier: Apache-2.0
"""EViT: keep the attentive tokens, fuse the rest (ICLR 2022, arXiv:2202.07800)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from visprune.core import (
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    StepBudget,
    VisualTokens,
)
from visprune.core.numeric import is_number
from visprune.core.signals import ClsAttention
from visprune.errors import BudgetError
from visprune.methods._depths import DEPTHS, checked_depths, resolved


@dataclass(frozen=True, kw_only=True)
class EViT(PruningMethod):
    """Keeps, at three depths of an encoder, the patches that the class token attends to most.

    Between attention and MLP of layers 3, 6 and 9 of 12, ``ceil(keep_ratio * n)`` of the n patches
    there stay, by the class token's attention in that layer (mean over heads), in falling order of
    it. The others become one token, the sum of their features times their attention; the weights
    are not made to sum to one. That token is a candidate later like any other. All as in the
    official code; ties keep the lower index. A model without a class token is refused.

    Args:
        keep_ratio: fraction kept at each of the depths, in (0, 1] (0.7 leaves a third in the end).
        fuse: whether the others are fused into a token, or dropped.
        layers: where: 0-based layers, or fractions of the depth.
    """

    name: ClassVar[str] = "evit"

    keep_ratio: float = 0.7
    fuse: bool = True
    layers: Sequence[int | float] = DEPTHS

    def __post_init__(self) -> None:
        """Check the ratio."""
        super().__post_init__()
        object.__setattr__(self, "layers", checked_depths(self.layers))
        if not (is_number(self.keep_ratio) and 0.0 < self.keep_ratio <= 1.0):
            raise BudgetError(
                f"keep_ratio is the fraction of patches kept at each depth, in (0, 1]; got "
                f"{self.keep_ratio!r}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per layer."""
        needs = (ClsAttention("own"),)
        step = StepBudget(keep_ratio=self.keep_ratio, extra=int(self.fuse))
        return tuple(
            Stage(Site.encoder(layer, after_attention=True), step, needs)
            for layer in resolved(self.layers, spec)
        )

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Rank by attention; fuse or drop the rest."""
        batch, count, keep = tokens.features.shape[0], tokens.num_tokens, ctx.num_keep
        if keep == count:
            return Selection.identity(batch, count, tokens.features.device)
        attention = ctx[ClsAttention("own")].mean(dim=1)  # [B, N]
        ranked, order = attention.sort(dim=1, descending=True, stable=True)
        if not self.fuse:
            return Selection(order[:, :keep], count)
        # The fused slot stands for the most attended of its patches.
        kept = torch.nn.functional.pad(ranked[:, keep : keep + 1], (keep, 0), value=1.0)
        source = order[:, keep + 1 :]
        return Selection.merge(
            order[:, : keep + 1],
            count,
            source,
            torch.full_like(source, keep),
            ranked[:, keep + 1 :],
            own=kept,
        )
