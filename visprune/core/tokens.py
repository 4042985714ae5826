# SPDX-License-Identifier: Apache-2.0
"""The visual tokens that a method chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class VisualTokens:
    """Visual tokens of B images (or videos) that have the same count N.

    Tokens that must stay, such as LLaVA-NeXT's newline tokens or an encoder's class token, are
    not in here: they are outside the budget and the machine puts them back.

    Attributes:
        features: ``[B, N, D]``, in raster order.
        size: patches that a token stands for, ``[B, N]``.
        pos: (t, h, w) of origin, ``[B, N, 3]``. ``t`` is the frame of a video, or the region of a
            tiled picture: 0 the thumbnail, 1 the full-resolution grid.
        kind: ``"image"`` or ``"video"``.
    """

    features: Tensor
    size: Tensor
    pos: Tensor
    kind: Literal["image", "video"] = "image"

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.features.shape[1]
