# SPDX-License-Identifier: Apache-2.0
"""What is known of a picture apart from any layer."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from visprune import ops
from visprune.core.signals.base import PictureSignal, Signal, TokenSignal
from visprune.core.tokens import VisualTokens
from visprune.ops.draw import checksum


@dataclass(frozen=True)
class Fingerprint(PictureSignal):
    """A number that depends on the picture's pixels alone: B ints, or a tensor of them."""

    def read(self, pixels: Tensor) -> int:
        """A checksum of the values in float32."""
        return checksum(pixels)

    def of_batch(self, pixels: Tensor) -> Tensor:
        """Those of a batch, ``[B]``, by an operator that a graph can hold."""
        return ops.picture_checksum(pixels)

    def joined(self, parts: list[int]) -> int:
        """A checksum of those of the parts."""
        return zlib.crc32(b"".join(part.to_bytes(4, "little") for part in parts))


@dataclass(frozen=True)
class Frames(TokenSignal):
    """The frame that each token belongs to, int64 ``[B, N]``: 0 the first of its clip.

    Where an encoder makes one token of two frames (Qwen-VL), such a pair counts as one. Tokens of
    a still picture are in frame 0, tiles or not.
    """

    def read(self, tokens: VisualTokens) -> Tensor:
        """Their place in time."""
        return (
            tokens.pos[..., 0] if tokens.kind == "video" else torch.zeros_like(tokens.pos[..., 0])
        )


@dataclass(frozen=True)
class PatchPositions(Signal):
    """Inside an encoder: let ``tokens.pos`` be filled in, which it always is elsewhere."""
