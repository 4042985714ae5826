# SPDX-License-Identifier: Apache-2.0
"""Control: keep every token, through the whole path of gathers, masks and cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from visprune.core import (
    Budget,
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


@dataclass(frozen=True, kw_only=True)
class KeepAll(PruningMethod):
    """Keeps all tokens: bit-equal to the untouched model, and what any method is compared with."""

    name: ClassVar[str] = "keep_all"
    gives_back: ClassVar[bool] = True  # none is gone

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage at the projector, or one in every layer of a vision transformer."""
        if spec.is_vit:
            return tuple(
                Stage(Site.encoder(layer, after_attention=True), StepBudget(keep_ratio=1.0))
                for layer in range(spec.encoder_layers)
            )
        return (Stage(Site.projector(), Budget(keep_ratio=1.0)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Everything."""
        return Selection.identity(
            tokens.features.shape[0], tokens.num_tokens, tokens.features.device
        )
