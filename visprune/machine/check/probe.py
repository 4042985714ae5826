# SPDX-License-Identifier: Apache-2.0
"""The method that a check prunes by: it asks the model nothing, and drops at two depths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visprune.core import (
    Budget,
    Context,
    ModelSpec,
    PruningMethod,
    Schedule,
    Selection,
    Site,
    Stage,
    VisualTokens,
)

# The fractional parts of its multiples are spread evenly, and in no order: no two neighbours leave
# or stay together for long.
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, kw_only=True)
class Probe(PruningMethod):
    """Drops a third of a picture's tokens at the projector, and half of them in mid-decoder.

    Args:
        deep: whether it drops inside the decoder too.
    """

    name: ClassVar[str] = "the check"

    deep: bool = True

    def schedule(self, spec: ModelSpec) -> Schedule:
        """Two stages; one where the decoder has a single layer."""
        first = Stage(Site.projector(), Budget(keep_ratio=2 / 3))
        if not self.deep or spec.num_layers < 2:
            return (first,)
        deepest = spec.num_layers if spec.deepest is None else spec.deepest
        layer = max(1, min(spec.num_layers // 2, deepest))
        second = Stage(Site.decoder(layer), Budget(keep_ratio=1 / 3))
        return first, second

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Tokens by their number alone: the same in every batch."""
        batch, count = tokens.features.shape[:2]
        steps = torch.arange(count, device=tokens.features.device, dtype=torch.float64)
        return Selection.top((steps * _GOLDEN).frac().expand(batch, -1), ctx.num_keep)
