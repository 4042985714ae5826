# SPDX-License-Identifier: Apache-2.0
"""Patches as they leave a layer of the image encoder, and what a layer has changed of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visprune.core.signals.base import EncoderLayer, EncoderSeen, EncoderSignal, EncoderUse


@dataclass(frozen=True)
class EncoderFeatures(EncoderSignal):
    """Features of the patches before the projector, ``[B, N, D]``, as they leave the layer."""

    requires: ClassVar[tuple[str, ...]] = ("encoder_features",)
    uses: ClassVar[EncoderUse] = "output"
    token_dim: ClassVar[int] = -2

    def read(self, seen: EncoderSeen) -> Tensor:
        """Without the tokens before the patches."""
        return seen.states()[:, seen.prefix :]


@dataclass(frozen=True)
class EncoderChange(EncoderSignal):
    """How far the layer before has moved each patch, Euclidean norm, ``[B, N]``.

    For a stage on entering a layer inside the encoder. It reads no attention.
    """

    requires: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[EncoderUse] = "entry"
    every: ClassVar[bool] = False

    layer: EncoderLayer = "own"

    def read(self, seen: EncoderSeen) -> Tensor:
        """Without gradient: what is ranked by has none."""
        entering, before = seen.entry()
        moved = (entering - before).detach()[:, seen.prefix :]
        wide = torch.promote_types(moved.dtype, torch.float32)
        return torch.linalg.vector_norm(moved, dim=-1, dtype=wide)

    def macs(self, tokens: int, width: int) -> int:
        """One square per feature."""
        return tokens * width
