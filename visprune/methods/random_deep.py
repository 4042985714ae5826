# SPDX-License-Identifier: Apache-2.0
"""Control: drop random tokens inside the decoder, past a depth."""

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
from visprune.methods._draw import draw


@dataclass(frozen=True, kw_only=True)
class RandomDeep(BudgetedMethod):
    """Keeps tokens drawn without replacement, on entering a decoder layer.

    What a method inside the decoder must beat at the same depth: past some layer the text has read
    what it needs, and any tokens do. As with ``random``, the draw depends on ``seed`` and on the
    picture's pixels, not on the batch.

    Args:
        layer: 0-based decoder layer on entering which the tokens are gone, or a fraction of the
            depth.
        seed: of the draw.
    """

    name: ClassVar[str] = "random_deep"

    layer: int | float = 0.5
    seed: int = 0

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder."""
        return (Stage(Site.decoder(self.layer), self.budget, (Fingerprint(),)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Draw for each picture."""
        return draw(tokens, ctx.num_keep, ctx[Fingerprint()], self.seed, ctx.stage)
