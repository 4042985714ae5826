# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: halve the image tokens at several depths (CVPR 2025, arXiv:2410.17247)."""

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
from visprune.core.signals import LastQueryAttention
from visprune.errors import ConfigError

_ABOUT_TO = LastQueryAttention(layer="own")


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(BudgetedMethod):
    """Keeps, at each depth, the tokens that the last prompt token is about to attend to most.

    The score is the softmax row of the last token under the *next* layer's own projections, mean
    over heads. The budget is what survives the last stage; an earlier stage keeps ``1 / factor``
    times as much as the one after it (with ``keep_ratio=0.125``: 50, 25 and 12.5 %, as published;
    counts are rounded down, as in the official code). Position ids close up
    (``positions="compact"``), as there. The official code takes one image per sample and pads on
    the right only; in training it averages the rows of all tokens that precede an answer, where
    this class asks the last token always.

    Args:
        depths: where the stages are, as fractions of the depth (8, 16 and 24 of 32 layers).
        factor: what a stage keeps of the one before, in (0, 1].
    """

    name: ClassVar[str] = "pyramiddrop"
    default_positions: ClassVar[PositionRule] = "compact"

    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    factor: float = 0.5

    def __post_init__(self) -> None:
        """Check the pyramid."""
        super().__post_init__()
        object.__setattr__(self, "depths", tuple(self.depths))
        if not self.depths or list(self.depths) != sorted(set(self.depths)):
            raise ConfigError(f"depths are increasing fractions of the depth, got {self.depths}.")
        if not 0.0 < self.factor <= 1.0:
            raise ConfigError(f"factor is what a stage keeps, in (0, 1]; got {self.factor}.")

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage per depth; each keeps more than the next."""
        stages: dict[int, Stage] = {}
        for number, depth in enumerate(self.depths):
            steps_left = len(self.depths) - 1 - number
            budget = self.budget.scaled(self.factor**-steps_left, rounding="floor")
            layer = Site.decoder(depth).resolve(spec.num_layers)
            # On a shallow model two depths may fall on one layer: the deeper one counts.
            stages[layer] = Stage(Site.decoder(layer), budget, needs=(_ABOUT_TO,))
        return tuple(stages.values())

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Top-k of the last query's attention."""
        return Selection.top(ctx[_ABOUT_TO].mean(dim=1), ctx.num_keep)
