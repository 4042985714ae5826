# SPDX-License-Identifier: Apache-2.0
"""Control: keep evenly spaced tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

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
from visprune.methods._depths import DEPTHS, geometric


@dataclass(frozen=True, kw_only=True)
class Uniform(BudgetedMethod):
    """Keeps tokens evenly spaced in raster order: ``floor((i + 1/2) n / k)`` for each i < k.

    At the projector; on a vision transformer alone where ``topk`` acts, by the same counts.
    """

    name: ClassVar[str] = "uniform"

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector, or three inside a vision transformer."""
        if spec.is_vit:
            return geometric(self.budget, DEPTHS, spec)
        return (Stage(Site.projector(), self.budget),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """The middle of each of k equal spans."""
        count, keep = tokens.num_tokens, ctx.num_keep
        steps = torch.arange(keep, device=tokens.features.device)
        index = ((2 * steps + 1) * count) // (2 * keep)
        return Selection.keep(index.expand(tokens.features.shape[0], -1), count)
