# SPDX-License-Identifier: Apache-2.0
"""Control: keep random tokens."""

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
from visprune.core.signals import Fingerprint
from visprune.methods._depths import DEPTHS, geometric
from visprune.methods._draw import draw


@dataclass(frozen=True, kw_only=True)
class RandomKeep(BudgetedMethod):
    """Keeps tokens drawn without replacement, at the projector.

    On a vision transformer alone it thins patches out where ``topk`` does, by the same counts:
    between attention and MLP of layers 3, 6 and 9 of 12.

    The draw depends on ``seed`` and on the picture's pixels, not on the batch: the same picture
    keeps the same tokens alone and among others.

    Args:
        seed: of the draw.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector, or three inside a vision transformer."""
        needs = (Fingerprint(),)
        if spec.is_vit:
            return geometric(self.budget, DEPTHS, spec, needs)
        return (Stage(Site.projector(), self.budget, needs),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Draw for each picture."""
        return draw(tokens, ctx.num_keep, ctx[Fingerprint()], self.seed, ctx.stage)
