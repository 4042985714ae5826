# SPDX-License-Identifier: Apache-2.0
"""SpAtten: cascade token pruning by the attention received so far (HPCA 2021, 2012.09852)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
from visprune.core.signals import ReceivedAttention
from visprune.errors import BudgetError, ConfigError


@dataclass(frozen=True, kw_only=True)
class SpAtten(PruningMethod):
    """Keeps, layer by layer, the patches that have received most attention until there.

    In every layer each patch adds to its importance the attention probabilities that it receives,
    summed over all heads and queries that are left, class token included. Between attention and
    MLP the most important patches stay, for all later layers, and take their importance with them.
    Prefix tokens are never dropped; ties keep the lower index.

    The number that stays falls linearly over the layers behind the front ones, to ``keep_ratio`` of
    the patches in the last. The paper gives no numbers for vision transformers, and its released
    code is another rule (a cache of a language model, by logits of one layer, without the cascade).
    Its pruning of heads is left out: what differs by sample saves nothing in a batch.

    Args:
        keep_ratio: fraction of a picture's patches left in the last layer, in (0, 1].
        front: fraction of the layers, from the first, that drop nothing, in [0, 1).
    """

    name: ClassVar[str] = "spatten"

    keep_ratio: float
    front: float = 0.15

    def __post_init__(self) -> None:
        """Check both."""
        super().__post_init__()
        if not (is_number(self.keep_ratio) and 0.0 < self.keep_ratio <= 1.0):
            raise BudgetError(
                f"keep_ratio is the fraction of patches left in the last layer, in (0, 1]; got "
                f"{self.keep_ratio!r}."
            )
        if not (is_number(self.front) and 0.0 <= self.front < 1.0):
            raise ConfigError(
                f"front is the fraction of layers that drop nothing, in [0, 1); got {self.front!r}."
            )

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage in every layer: those in front count, and drop nothing."""
        layers = spec.encoder_layers
        first = min(math.ceil(self.front * layers), layers - 1)
        stages = []
        for layer in range(layers):
            done = max(0, layer + 1 - first) / (layers - first)
            ratio = 1.0 - (1.0 - self.keep_ratio) * done
            step = StepBudget(keep_ratio=ratio, of="original")
            needs = (ReceivedAttention("own"),)
            stages.append(Stage(Site.encoder(layer, after_attention=True), step, needs))
        return tuple(stages)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Add up, and keep the most important."""
        queries = tokens.num_tokens + ctx.prefix
        importance = ctx[ReceivedAttention("own")].sum(dim=1) * queries  # it is a mean over them
        if ctx.carried is not None:
            importance = importance + ctx.carried
        return Selection.top(importance, ctx.num_keep).carrying(importance)
