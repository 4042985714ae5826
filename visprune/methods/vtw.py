# SPDX-License-Identifier: Apache-2.0
"""VTW: withdraw all visual tokens at one layer (AAAI 2025, arXiv:2405.05803)."""

from __future__ import annotations

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
    VisualTokens,
)


@dataclass(frozen=True, kw_only=True)
class VTW(PruningMethod):
    """Drops every visual token on entering one layer: what they held has moved into the text.

    It has no budget: the layer is the setting (15 of LLaVA-1.5-7B's 32; the paper calibrates it
    per model, as the smallest layer from 5 up at which the next word's distribution moves by less
    than a threshold: ``visprune calibrate vtw``). Position ids stay (the official
    ``pe_type="keep"``); ``positions="compact"`` is its other setting.

    Args:
        layer: 0-based decoder layer on entering which the tokens are gone, or a fraction of the
            depth.
    """

    name: ClassVar[str] = "vtw"

    layer: int | float = 15 / 32

    def schedule(self, spec: ModelSpec) -> Schedule:
        """One stage inside the decoder, which decides itself."""
        return (Stage(Site.decoder(self.layer)),)

    def select(self, tokens: VisualTokens, ctx: Context) -> Selection:
        """Nothing."""
        shape, device = tokens.features.shape[:2], tokens.features.device
        return Selection.where(torch.zeros(shape, dtype=torch.bool, device=device))
