# SPDX-License-Identifier: Apache-2.0
"""Patches as they leave a layer of the image encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from visprune.core.signals.base import EncoderSeen, EncoderSignal


@dataclass(frozen=True)
class EncoderFeatures(EncoderSignal):
    """Features of the patches before the projector, ``[B, N, D]``, as they leave the layer."""

    requires: ClassVar[tuple[str, ...]] = ("encoder_features",)
    uses: ClassVar[Literal["attention", "output"]] = "output"
    token_dim: ClassVar[int] = -2

    def read(self, seen: EncoderSeen) -> Tensor:
        """Without the tokens before the patches."""
        return seen.states()[:, seen.prefix :]
