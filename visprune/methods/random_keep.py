# SPDX-License-Identifier: Apache-2.0
"""Control: keep random tokens."""

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
from visprune.core.signals import Fingerprint
from visprune.methods._depths import DEPTHS, geometric


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
        drawn = []
        for fingerprint in ctx[Fingerprint()]:
            state = self.seed * 1_000_003 + ctx.stage * 7_919 + fingerprint
            generator = torch.Generator().manual_seed(state % 2**63)
            drawn.append(torch.randperm(tokens.num_tokens, generator=generator)[: ctx.num_keep])
        return Selection.keep(torch.stack(drawn).to(tokens.features.device), tokens.num_tokens)
