# SPDX-License-Identifier: Apache-2.0
"""GemFilter: read the prompt to a filter layer, then read what it points at (arXiv:2409.17422)."""

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
from visprune.core.method import PositionRule
from visprune.core.numeric import is_whole
from visprune.core.signals import LastQueryLogits
from visprune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GemFilter(BudgetedMethod):
    """Keeps the tokens that the prompt's last query points at in a filter layer of a first pass.

    The score is the product of that query with each key, summed over heads, neither scaled nor a
    softmax, and the mean over ``kernel`` neighbours; ties keep the lower index. The model then
    reads the shorter prompt from its first layer on, so every layer and its cache hold the same
    tokens. As in the official code position ids close up (``positions="compact"``); tokens with
    (t, h, w) places keep them.

    The paper filters a text, its template and its last token too. Here the budget counts visual
    tokens, and all text stays. The first pass ends at the queries and keys of the filter layer,
    where the official code runs that layer to its end; ``run.cost()`` counts it as selection. It
    is worth it where the answer is long or the prompt much longer than what is kept.

    Args:
        layer: 0-based filter layer, or a fraction of the depth (published: 13 of 32 for
            Llama-3.1-8B, 19 of 40 and of 32 for Mistral-Nemo-12B and Phi-3.5-mini); of a fraction
            the first layer with attention from there on.
        kernel: neighbours of the mean, odd.
    """

    name: ClassVar[str] = "gemfilter"
    default_positions: ClassVar[PositionRule] = "compact"

    layer: int | float = 13 / 32
    kernel: int = 5

    def __post_init__(self) -> None:
        """Check the mean."""
        super().__post_init__()
        if not is_whole(self.kernel) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ConfigError(f"kernel is an odd number of neighbours, got {self.kernel!r}.")

    def signal(self, spec: ModelSpec) -> LastQueryLogits:
        """What the first pass is read for."""
        layer = Site.decoder(self.layer).resolve(spec.num_layers)
        if layer != self.layer:
            attends = (n for n in range(layer, spec.num_layers) if n not in spec.recurrent)
            layer = next(attends, layer)
        return LastQueryLogits(at=layer, kernel=self.kernel)

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage before the decoder."""
        return (Stage(Site.projector(), self.budget, needs=(self.signal(spec),)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Top-k of the products."""
        signal = next(s for s in ctx.signals if isinstance(s, LastQueryLogits))
        return Selection.top(ctx[signal], ctx.num_keep)
