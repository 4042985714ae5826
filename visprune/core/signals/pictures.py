# SPDX-License-Identifier: Apache-2.0
"""What is known of a picture apart from any layer."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from visprune.core.signals.base import PictureSignal, Signal


@dataclass(frozen=True)
class Fingerprint(PictureSignal):
    """A number that depends on the picture's pixels alone: a tuple of B ints."""

    def read(self, pixels: Tensor) -> int:
        """A checksum of the values in float32."""
        data = pixels.detach().to("cpu", torch.float32).contiguous()
        return zlib.crc32(data.numpy().tobytes())

    def joined(self, parts: list[int]) -> int:
        """A checksum of those of the parts."""
        return zlib.crc32(b"".join(part.to_bytes(4, "little") for part in parts))


@dataclass(frozen=True)
class PatchPositions(Signal):
    """Inside an encoder: let ``tokens.pos`` be filled in, which it always is elsewhere."""
